"""A checkpoint's own config against that of the run that goes on from it, or starts with its weights.

What makes the model another function is an error, unless `ckpt.allow_model_changes` names it; other changes are told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from internlm.checkpoint.reading import CONFIG_FILE, listed, read_config_keys
from internlm.config.compare import Change, changes_between
from internlm.config.schema import Config
from internlm.initialize.stages import build_meta_model
from internlm.model.architecture import Architecture
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

_NOT_OF_THE_TRAINING = (
    *("JOB_NAME", "ckpt", "monitor", "tensorboard", "enable_tb", "tensorboard_folder", "resume_tb_folder"),
    *("generation", "grad_profiling"),
)
"""Top-level names that change nothing of what is trained, and are not told."""


def saved_config(path: StoragePath) -> Config | None:
    """The config that a checkpoint of ours was written with; None, with a warning, where it cannot be read."""
    try:
        return Config.model_validate(read_config_keys(path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        logger.warning("%s: its config cannot be compared with that of this run: %s", path / CONFIG_FILE, reason)
        return None


def compare_configs(
    saved: Config,
    config: Config,
    what: str,
    contents: Collection[str],
    learning_rate: Callable[[Config], float] | None = None,
) -> None:
    """Judge what a run has changed against a checkpoint of ours.

    Args:
        saved: config of the checkpoint.
        config: of this run.
        what: the checkpoint, for messages.
        contents: what of it is loaded; with weights alone, only changes of the model count.
        learning_rate: config -> learning rate of the next step; None: it does not go on.

    Raises:
        CheckpointError: the model is another function, and that is not allowed.
    """
    # As it would be read from a checkpoint: a tuple is no list there.
    config = Config.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    changes = changes_between(saved, config)
    if "model" in contents:
        check_same_function(saved, config, what)
    counts = ("model", "model_type") if set(contents) == {"model"} else None
    told = [
        str(change)
        for change in changes
        if (counts is None or _section(change) in counts) and _section(change) not in _NOT_OF_THE_TRAINING
    ]
    if learning_rate is not None:
        before, after = learning_rate(saved), learning_rate(config)
        if before != after:
            told.append(f"learning rate of the next step: {before:g} -> {after:g}")
    if told:
        logger.warning("the config differs from that of %s:%s", what, listed(told, most=100))


def check_same_function(saved: Config, config: Config, what: str, *, translated: bool = False) -> None:
    """Refuse weights that were trained as another function.

    Args:
        saved: has the model that the weights were trained as.
        config: of this run.
        what: whose weights they are, for messages.
        translated: the weights are brought into the form that the run wants: the order of rotated channels, and a
            head of its own, which starts as the tied one was.

    Raises:
        CheckpointError: the function is another one, and that is not allowed.
    """
    marked = [change for change in changes_between(saved, config) if change.changes_outputs]
    if not marked:
        return
    old, new = _function(saved, translated), _function(config, translated)
    if old is not None and new is not None:
        if _same(old, new, translated):
            return
        marked = _to_blame(config, new, marked, translated) or marked
    allowed = config.ckpt.allow_model_changes
    refused = [change for change in marked if not _is_allowed(change.path, allowed)]
    if refused:
        keys = tuple(change.path for change in refused)
        raise CheckpointError(
            f"{what} was trained as another function than this config asks for; the same weights would give other "
            f"outputs:{listed([str(change) for change in refused])}\n"
            f"set the keys back; or, if the change is meant, ckpt.allow_model_changes = {keys}"
        )
    logger.warning(
        "%s was trained as another function, which ckpt.allow_model_changes allows:%s",
        what,
        listed([str(change) for change in marked]),
    )


def _to_blame(config: Config, function: dict[str, Any], changes: list[Change], translated: bool) -> list[Change]:
    """The changes that make another function, and not those that say the same in other words or that nothing reads:
    each is taken back in turn, to see whether that matters."""
    found = []
    for change in changes:
        values = config.model_dump(mode="json")
        *outer, name = change.path.split(".")
        place = values
        for part in outer:
            place = place[part]
        place[name] = change.old
        try:
            config = Config.model_validate(values)
        except ValueError:
            # It cannot be taken back alone.
            found.append(change)
            continue
        without = _function(config, translated)
        if without is None or not _same(without, function, translated):
            found.append(change)
        function = function if without is None else without
    return found


def _section(change: Change) -> str:
    return change.path.split(".")[0]


def _is_allowed(path: str, allowed: bool | tuple[str, ...]) -> bool:
    if isinstance(allowed, bool):
        return allowed
    return any(path == name or path.startswith(f"{name}.") for name in allowed)


def _function(config: Config, translated: bool) -> dict[str, Any] | None:
    """What the outputs follow from; None for a user's own model, and for keys that make none."""
    try:
        architecture = getattr(build_meta_model(config), "architecture", None)
    except ConfigError:
        return None
    if not isinstance(architecture, Architecture):
        return None
    function = architecture.function
    if translated:
        del function["rope interleaved"]
    return function


def _same(old: dict[str, Any], new: dict[str, Any], translated: bool) -> bool:
    differing = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    if translated and old["tie_word_embeddings"]:
        differing.discard("tie_word_embeddings")
    return not differing
