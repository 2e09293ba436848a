"""Compares the lengths for which a checkpoint was trained with those of the run that loads it."""

from __future__ import annotations

from internlm.config.rules.positions import PAGE
from internlm.config.schema import Config
from internlm.config.schema.model import ModelConfig
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

_KEYS = ("rope_base", "rope_scaling", "use_dynamic_ntk_rope")
"""Keys of the model that determine the angle of a position."""


def log_position_changes(trained: Config, config: Config, what: str, *, trained_seq_len: int = 0) -> None:
    """Log an extension of the context, and warn of positions that the weights do not know.

    Args:
        trained: config of the model that the weights were trained with.
        config: of this run.
        what: names the source of the weights in messages.
        trained_seq_len: length of the samples of that training, where the source records it.
    """
    length = trained.model.context_length
    if length is None:
        return
    length = max(length, trained_seq_len)
    changed = [key for key in _KEYS if getattr(trained.model, key) != getattr(config.model, key)]
    seq_len = config.data.seq_len
    if seq_len > length and not changed:
        logger.warning(
            "data.seq_len = %d is longer than the %d tokens for which %s was trained, and its positions are not "
            "scaled: those beyond are new to the model; model.rope_scaling or a larger model.rope_base helps (%s)",
            *(seq_len, length, what, PAGE),
        )
    elif seq_len > length:
        logger.info(
            "the context of %s is extended from %d to %s tokens by %s",
            *(what, length, config.model.context_length or "any number of", _settings(config.model, changed)),
        )
    scaling = config.model.rope_scaling
    if scaling is None or scaling.type == "linear" or not changed:
        return
    pretrained = _pretrained_length(trained.model) or length
    given = _pretrained_length(config.model)
    if given != pretrained:
        logger.warning(
            "model.rope_scaling extends a model that was trained for %d tokens, but %s was trained for %d: set "
            "model.rope_scaling.original_max_position_embeddings = %d",
            *(given, what, pretrained, pretrained),
        )


def _pretrained_length(model: ModelConfig) -> int | None:
    """The length of pretraining that scaled positions extend; None without scaling."""
    scaling = model.rope_scaling
    return None if scaling is None else scaling.original_max_position_embeddings or model.max_position_embeddings


def _settings(model: ModelConfig, keys: list[str]) -> str:
    scaling = model.rope_scaling
    values = {key: getattr(model, key) for key in keys}
    if "rope_scaling" in values:
        values["rope_scaling"] = None if scaling is None else f"{scaling.type}, factor {scaling.factor:g}"
    return ", ".join(f"model.{key} = {value}" for key, value in values.items())
