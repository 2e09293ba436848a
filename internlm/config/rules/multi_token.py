"""Rules on layers that predict later tokens."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config

KEY = "model.num_nextn_predict_layers"


def multi_token(config: Config, world_size: int) -> Iterator[Problem]:
    """Requirements of layers that predict later tokens."""
    model, data, tensor = config.model, config.data, config.parallel.tensor
    value = f"{KEY} = {model.num_nextn_predict_layers}"
    if model.num_nextn_predict_layers == 0:
        return
    if data.packing != "unpacked" and not data.document_mask:
        yield Problem(
            (KEY, "data.document_mask", "data.packing"),
            f"{value} needs the ends of documents, which rows without a document mask do not have; set "
            "data.document_mask = True (with data.packing = 'cut' or 'best_fit')",
        )
    if tensor.mode != "isp" and model.hidden_size % tensor.size:
        yield Problem(
            (KEY, "model.hidden_size", "parallel.tensor.size"),
            f"{value}: model.hidden_size = {model.hidden_size} is not divisible by parallel.tensor.size = "
            f"{tensor.size}, so the projection of these layers cannot be split; set parallel.tensor.mode = 'isp'",
        )
