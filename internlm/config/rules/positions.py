"""Rules on the length of samples and the positions that the model is meant for."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.internevo_differences import comes_from_internevo
from internlm.config.problem import Problem
from internlm.config.schema import Config
from internlm.config.schema.base import is_set

PAGE = "doc/long_context.md"


def pretrained_length(config: Config, world_size: int) -> Iterator[Problem]:
    """`rope_scaling` extends a length that the config must give."""
    model = config.model
    if model.rope_scaling is None or "max_position_embeddings" in model.model_fields_set:
        return
    if model.rope_scaling.original_max_position_embeddings is None:
        yield Problem(
            ("model.rope_scaling", "model.max_position_embeddings"),
            f"model.rope_scaling of type '{model.rope_scaling.type}' needs the length of pretraining: give "
            "model.rope_scaling.original_max_position_embeddings",
        )


def sequence_length(config: Config, world_size: int) -> Iterator[Problem]:
    """Samples must not be longer than the positions are meant for; configs of InternEvo only get a notice."""
    model, seq_len = config.model, config.data.seq_len
    if not exceeds_context(config):
        return
    if model.rope_scaling is not None:
        original = model.rope_scaling.original_max_position_embeddings or model.max_position_embeddings
        yield Problem(
            ("data.seq_len", "model.rope_scaling.factor"),
            f"data.seq_len = {seq_len} is longer than the {model.context_length} tokens to which model.rope_scaling "
            f"extends {original} tokens of pretraining; set model.rope_scaling.factor = {seq_len / original:g}, or "
            f"shorten data.seq_len ({PAGE})",
        )
    elif not comes_from_internevo(config, lambda path: is_set(config, path) or None):
        length = model.max_position_embeddings
        if model.hf_class is not None:
            yield Problem(
                ("data.seq_len", "hf.cfg_extra_kwargs"),
                f"data.seq_len = {seq_len} is longer than the max_position_embeddings = {length} of the Hugging Face "
                f"class; if it is trained for this length as it is, set hf.cfg_extra_kwargs = "
                f"dict(max_position_embeddings={seq_len}), to extend it with its rope_parameters; else shorten "
                "data.seq_len",
            )
            return
        yield Problem(
            ("data.seq_len", "model.max_position_embeddings"),
            f"data.seq_len = {seq_len} is longer than model.max_position_embeddings = {length}. To extend a pretrained "
            f"model, set model.rope_scaling = dict(type='yarn', factor={seq_len / length:g}, "
            f"original_max_position_embeddings={length}) and model.max_position_embeddings = {seq_len} ({PAGE}); if "
            f"the model is trained for this length as it is, set model.max_position_embeddings = {seq_len}",
        )


def exceeds_context(config: Config) -> bool:
    """Whether samples are longer than the positions of the model are meant for."""
    length = config.model.context_length
    return length is not None and config.data.seq_len > length
