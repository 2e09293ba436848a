"""The state of a run as the tensors of a checkpoint, and back into a run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from internlm.checkpoint.boxed_tensor import BoxedTensor, merge_by_key
from internlm.checkpoint.folder import WHOLE_RUN
from internlm.checkpoint.fused_weights import describe_regrouping, heads_of, in_stored_form, stored_names
from internlm.checkpoint.reading import listed, load_tensors, read_context, saved_shapes
from internlm.checkpoint.weight_source import WeightSource, finite
from internlm.core.batch_source import StatefulSource
from internlm.core.communication.objects import of_all_ranks
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.context.random import set_random_state
from internlm.core.hooks import TrainState
from internlm.core.optimizer_protocol import Optimizer
from internlm.core.parallel.fsdp import local_tensor, reshard
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.core.trainer import Trainer
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

MODEL_PREFIX = "model/"
OPTIMIZER_PREFIX = "optimizer/"
MASTER_PREFIX = f"{OPTIMIZER_PREFIX}master/"


def model_tensors(*chunks: nn.Module) -> dict[str, Any]:
    """`model/<name>` -> this rank's boxes of every parameter of these modules, under its global name."""
    for chunk in chunks:
        reshard(chunk)
    parameters = dict.fromkeys(parameter for chunk in chunks for parameter in chunk.parameters())
    specs = {parameter: shard_spec_of(parameter) for parameter in parameters}
    return dict(
        merge_by_key(
            (f"{MODEL_PREFIX}{spec.name}", BoxedTensor.of_parameter(local_tensor(parameter), spec))
            for parameter, spec in specs.items()
        )
    )


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Any]:
    """`optimizer/<kind>/<name>` -> this rank's boxes of masters and moments, under the parameter's global name."""

    def dtype_of(key: str, parameter: nn.Parameter) -> torch.dtype:
        return torch.float32 if key.startswith("master/") else optimizer.form.moment_dtype(parameter.dtype)

    return dict(
        merge_by_key(
            (
                f"{OPTIMIZER_PREFIX}{key}",
                BoxedTensor(shard_spec_of(parameter).global_shape, dtype_of(key, parameter), pieces),
            )
            for key, parameter, pieces in optimizer.sharded_state()
        )
    )


def load_run(trainer: Trainer, path: StoragePath, wanted: set[str], *, strict: bool = True) -> None:
    """Put parts of a checkpoint of ours into a trainer; collective. See `CheckpointManager.load`.

    Raises:
        CheckpointError: the checkpoint does not fit.
    """
    optimizer = trainer.engine.optimizer
    context = trainer.context
    tensors: dict[str, Any] = {}
    if "model" in wanted:
        tensors.update(model_tensors(*optimizer.chunks))
    if "optimizer" in wanted:
        tensors.update(optimizer_tensors(optimizer))
        if "model" not in wanted:
            # Masters are weights: the next update would put them in the place of those that the user wants.
            tensors = {key: value for key, value in tensors.items() if not key.startswith(MASTER_PREFIX)}
    saved = saved_shapes(path)
    if "model" in wanted:
        names = {key.removeprefix(MODEL_PREFIX) for key in saved if key.startswith(MODEL_PREFIX)}
        _compare_names(optimizer.chunks, names, f"the checkpoint '{path}'", context, strict=strict)
    _log_regrouping(f"the checkpoint '{path}'", tensors, saved, context)
    tensors = in_stored_form(tensors, saved, heads_of(optimizer.chunks))
    stateless = _compare_states(context, tensors, saved) if "optimizer" in wanted else set()
    if not strict or "optimizer" in wanted:
        required = () if not strict else (MODEL_PREFIX,)
        tensors = {key: value for key, value in tensors.items() if key in saved or key.startswith(required)}
    rng_key = f"rng/{context.rank}"
    whole_run = wanted == set(WHOLE_RUN)
    state = read_context(path) if wanted != {"model"} else {}
    if whole_run and state["world_size"] == context.world_size:
        tensors[rng_key] = None
    load_tensors(path, tensors, no_dist=context.world_group is None)
    if "model" in wanted:
        optimizer.reset_masters(keep_loaded="optimizer" in wanted)
        _reset_masters_of(optimizer, stateless)
    _put_back(trainer, state, wanted)
    if tensors.get(rng_key) is not None:
        set_random_state(tensors[rng_key])


def _compare_states(context: ParallelContext, tensors: dict[str, Any], saved: Collection[str]) -> set[str]:
    """Report parameters that were frozen in the checkpoint and are trained now, and the other way round; collective.

    Returns:
        Names of the parameters whose state the checkpoint lacks.

    Raises:
        CheckpointError: the checkpoint has only a part of the state of a parameter, or nothing of any: it is that of
            another optimizer.
    """
    own = {key for key in tensors if key.startswith(OPTIMIZER_PREFIX)}
    own = set().union(*of_all_ranks(context, own))
    missing = sorted({_parameter_of(key) for key in own - set(saved)})
    kept = {_parameter_of(key) for key in own & set(saved)}
    if missing and (not kept or not kept.isdisjoint(missing)):
        lines = [f"'{key}' is missing" for key in sorted(own - set(saved))]
        raise CheckpointError(f"the optimizer state of the checkpoint does not fit this optimizer:{listed(lines)}")
    trained = {_parameter_of(key) for key in own}
    saved_states = {_parameter_of(key) for key in saved if key.startswith(OPTIMIZER_PREFIX)}
    dropped = sorted(saved_states - trained)
    if missing:
        logger.warning(
            "%d parameters start with an empty optimizer state, as the checkpoint has none of them: %s",
            len(missing),
            ", ".join(missing),
        )
    if dropped:
        logger.warning(
            "%d parameters are frozen now, so their optimizer state is not loaded: %s", len(dropped), ", ".join(dropped)
        )
    return set(missing)


@torch.no_grad()
def _reset_masters_of(optimizer: Optimizer, names: Collection[str]) -> None:
    for key, parameter, pieces in optimizer.sharded_state():
        kind, _, name = key.partition("/")
        if kind == "master" and name in names:
            for box, piece in pieces:
                piece.copy_(local_tensor(parameter)[box.local_slices()])


def _parameter_of(key: str) -> str:
    return key.removeprefix(OPTIMIZER_PREFIX).partition("/")[2]


def _put_back(trainer: Trainer, state: dict[str, Any], wanted: set[str]) -> None:
    """Counters, scaler, data cursor and hooks."""
    optimizer = trainer.engine.optimizer
    if "optimizer" in wanted:
        optimizer.num_updates = state["num_updates"]
        optimizer.scaler.load_state_dict(state["scaler"])
        trainer.num_skipped_updates.fill_(state["inf_nan_skip_batches"])
    if "scheduler" in wanted:
        trainer.state.step = TrainState(**state["state"]).step
        trainer.num_known_updates = state["num_updates"]
    if "sampler" in wanted:
        saved = TrainState(**state["state"])
        trainer.state.num_consumed_samples = saved.num_consumed_samples
        trainer.state.num_consumed_tokens = saved.num_consumed_tokens
        if isinstance(trainer.train_loader, StatefulSource) and state.get("data"):
            trainer.train_loader.load_state_dict(state["data"])
    if wanted == set(WHOLE_RUN):
        saved_hooks: dict[str, Any] = dict(state["hooks"])
        for hook in trainer.hooks:
            if hook.name in saved_hooks:
                hook.load_state_dict(saved_hooks.pop(hook.name))
        unused = sorted(name for name, saved_state in saved_hooks.items() if saved_state)
        if unused:
            logger.warning("the checkpoint has the state of hooks that this run lacks: %s", ", ".join(unused))


def load_weights(trainer: Trainer, source: WeightSource, what: str, *, strict: bool = True) -> None:
    """Put weights of another origin into a trainer, one tensor at a time; collective. The fp32 masters follow.

    Args:
        trainer: freshly built, before its first step.
        source: weights under our names.
        what: the source, for messages.
        strict: see `CheckpointManager.load`.

    Raises:
        CheckpointError: the weights do not fit.
    """
    optimizer = trainer.engine.optimizer
    names = set(source.names())
    _compare_names(optimizer.chunks, names, what, trainer.context, strict=strict)
    shapes = {name: tuple(source.shape(name)) for name in names}
    tensors = {key.removeprefix(MODEL_PREFIX): boxed for key, boxed in model_tensors(*optimizer.chunks).items()}
    _log_regrouping(what, tensors, names, trainer.context)
    tensors = in_stored_form(tensors, shapes, heads_of(optimizer.chunks))
    wanted = {name: boxed for name, boxed in tensors.items() if name in names}
    mistakes = [
        f"'{name}' has shape {list(shapes[name])}, the model wants {list(boxed.size())}"
        for name, boxed in wanted.items()
        if shapes[name] != tuple(boxed.size())
    ]
    if mistakes:
        raise CheckpointError(f"{what} does not fit this model:{listed(mistakes)}")
    for name, boxed in wanted.items():
        whole: Tensor = finite(source.read(name), name, what)
        for box, piece in boxed.pieces:
            piece.copy_(finite(whole[box.global_slices()], name, what, piece.dtype))
    optimizer.reset_masters()


def _compare_names(
    chunks: Iterable[nn.Module], found: set[str], what: str, context: ParallelContext, *, strict: bool
) -> None:
    """Compare the names of the whole model with those in a source of weights; collective.

    Raises:
        CheckpointError: they differ, and `strict`.
    """
    own = {shard_spec_of(parameter).name for chunk in chunks for parameter in chunk.parameters()}
    names = {stored for name in set().union(*of_all_ranks(context, own)) for stored in stored_names(name, found)}
    lines = [f"'{MODEL_PREFIX}{name}' is missing" for name in sorted(names - found)]
    lines += [f"'{MODEL_PREFIX}{name}' is no part of the model" for name in sorted(found - names)]
    if not lines:
        return
    if strict:
        raise CheckpointError(
            f"{what} does not fit this model (to load it all the same, set strict=False):{listed(lines)}"
        )
    logger.warning("%s does not fit this model in all, and is loaded as far as it does:%s", what, listed(lines))


def _log_regrouping(what: str, keys: Iterable[str], found: Collection[str], context: ParallelContext) -> None:
    """Name the projections that a source stores fused and the model holds apart, or the other way round; collective."""
    own = [key for key in keys if stored_names(key, found) != (key,)]
    lines = describe_regrouping(set().union(*of_all_ranks(context, own)), found)
    if lines:
        logger.info(
            "%s stores these projections in another form than the model; they are regrouped:%s", what, listed(lines)
        )
