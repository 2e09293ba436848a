"""Compares the config stored in a checkpoint with that of the run that resumes it or loads its weights.

A change that makes the model another function is an error unless `ckpt.allow_model_changes` names it. Other changes are
logged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

from internlm.checkpoint.reading import CONFIG_FILE, listed, read_config_keys
from internlm.config.compare import Change, changes_between
from internlm.config.schema import Config
from internlm.initialize.position_changes import log_position_changes
from internlm.initialize.stages import build_meta_model
from internlm.model.architecture import Architecture
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

_UNRELATED_TO_TRAINING = (
    *("JOB_NAME", "ckpt", "monitor", "tensorboard", "enable_tb", "tensorboard_folder", "resume_tb_folder"),
    *("generation", "grad_profiling"),
)
"""Top-level keys that do not affect what is trained; their changes are not logged."""


def saved_config(path: StoragePath) -> Config | None:
    """The config of the run that wrote a native checkpoint; None, with a warning, if it cannot be read."""
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
    """Log the config changes since a native checkpoint was saved, and refuse those that change the model's function.

    Args:
        saved: config of the checkpoint.
        config: of this run.
        what: names the checkpoint in messages.
        contents: the parts that are loaded; if only the weights, only changes of the model are logged.
        learning_rate: config -> learning rate of the next step; None if the schedule is not resumed.

    Raises:
        CheckpointError: the model computes another function, which the config does not allow.
    """
    # Round-trip through JSON, as the saved config did: it turns tuples into lists.
    config = Config.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    changes = changes_between(saved, config)
    if "model" in contents:
        check_same_function(saved, config, what)
        log_position_changes(saved, config, what, trained_seq_len=saved.data.seq_len)
    relevant = ("model", "model_type") if set(contents) == {"model"} else None
    differences = [
        str(change)
        for change in changes
        if (relevant is None or _section(change) in relevant) and _section(change) not in _UNRELATED_TO_TRAINING
    ]
    if learning_rate is not None:
        before, after = learning_rate(saved), learning_rate(config)
        if before != after:
            differences.append(f"learning rate of the next step: {before:g} -> {after:g}")
    if differences:
        logger.warning("the config differs from that of %s:%s", what, listed(differences, limit=100))


def check_same_function(saved: Config, config: Config, what: str, *, translated: bool = False) -> None:
    """Refuse weights that were trained with a model of another function.

    Args:
        saved: config of the model that the weights were trained with.
        config: of this run.
        what: names the source of the weights in messages.
        translated: the weights are converted to the run's form: the order of rotary channels is permuted, and an
            untied head starts as a copy of the tied one.

    Raises:
        CheckpointError: the functions differ, which the config does not allow.
    """
    marked = [change for change in changes_between(saved, config) if change.changes_outputs]
    if not marked:
        return
    old, new = function_of(saved, translated), function_of(config, translated)
    if old is not None and new is not None:
        if _same(old, new, translated):
            return
        marked = _changes_with_effect(config, new, marked, translated) or marked
    allowed = config.ckpt.allow_model_changes
    refused = [change for change in marked if not _is_allowed(change.path, allowed)]
    if refused:
        keys = tuple(change.path for change in refused)
        raise CheckpointError(
            f"{what} was trained as another function than this config defines; the same weights would give different "
            f"outputs:{listed([str(change) for change in refused])}\n"
            f"restore the keys; or, if the change is intended, set ckpt.allow_model_changes = {keys}"
        )
    logger.warning(
        "%s was trained as another function, which ckpt.allow_model_changes allows:%s",
        what,
        listed([str(change) for change in marked]),
    )


def _changes_with_effect(
    config: Config, function: dict[str, Any], changes: list[Change], translated: bool
) -> list[Change]:
    """The changes that alter the model's function, without synonyms and keys that nothing reads.

    Each change is reverted in turn and the function compared.
    """
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
            # The config is invalid with this change alone reverted.
            found.append(change)
            continue
        without = function_of(config, translated)
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


def function_of(config: Config, translated: bool = False) -> dict[str, Any] | None:
    """What determines a model's outputs; None for a custom model, and for keys that describe no valid model.

    Args:
        translated: see `check_same_function`.
    """
    try:
        model = build_meta_model(config)
    except ConfigError:
        return None
    architecture = getattr(model, "architecture", None)
    if not isinstance(architecture, Architecture):
        return None
    function = architecture.function | getattr(model, "image_function", {})
    if translated:
        del function["rope interleaved"]
    return function


def _same(old: dict[str, Any], new: dict[str, Any], translated: bool) -> bool:
    differing = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    if translated and old["tie_word_embeddings"]:
        differing.discard("tie_word_embeddings")
    return not differing
