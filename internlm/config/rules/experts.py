"""Rules on experts."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config


def experts(config: Config, world_size: int) -> Iterator[Problem]:
    """Requirements of experts; a dense model must not have expert parallelism."""
    parallel, experts = config.parallel, config.model.num_experts
    if experts <= 1:
        for path, size in (
            ("parallel.expert.size", parallel.expert.size),
            ("parallel.expert_weight.size", parallel.expert_weight.size),
        ):
            if size > 1:
                yield Problem(
                    (path, "model.num_experts"),
                    f"{path} = {size}: the model is dense (model.num_experts = {experts}); set it to 1",
                )
        return
    if config.model.moe_type != "Dropless":
        yield Problem(
            ("model.moe_type", "model.num_experts"),
            f"model.moe_type = {config.model.moe_type!r}: experts with a capacity, which drop tokens, are not yet supported; "
            "set it to 'Dropless'",
        )
    if config.model.top_k > experts:
        yield Problem(
            ("model.top_k", "model.num_experts"),
            f"model.top_k = {config.model.top_k} is more than model.num_experts = {experts}",
        )
