"""Converts the state of a run into tensors and counters of a checkpoint, and restores it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from internlm.checkpoint.boxed_tensor import BoxedTensor, merge_by_key
from internlm.checkpoint.fused_weights import describe_regrouping, heads_of, in_stored_form, stored_names
from internlm.checkpoint.manifest import WHOLE_RUN
from internlm.checkpoint.optimizer_states import MASTER_PREFIX, OPTIMIZER_PREFIX, compare_states, reset_masters_of
from internlm.checkpoint.reading import listed, load_tensors, read_context, saved_shapes
from internlm.checkpoint.weight_source import FileNames, WeightSource, finite
from internlm.core.batch_source import MergeableSource, StatefulSource
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


def model_tensors(*chunks: nn.Module) -> dict[str, Any]:
    """`model/<global name>` -> this rank's boxes of every parameter of these modules."""
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
    """`optimizer/<kind>/<global name of the parameter>` -> this rank's boxes of every state tensor."""
    return dict(
        merge_by_key(
            (f"{OPTIMIZER_PREFIX}{key}", BoxedTensor(shard_spec_of(parameter).global_shape, pieces[0][1].dtype, pieces))
            for key, parameter, pieces in optimizer.sharded_state()
            if pieces
        )
    )


def load_run(trainer: Trainer, path: StoragePath, wanted: set[str], *, strict: bool = True) -> None:
    """Load parts of a checkpoint into a trainer; collective. See `CheckpointManager.load`.

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
            # Masters are weights: the next update would overwrite the user's weights with them.
            tensors = {key: value for key, value in tensors.items() if not key.startswith(MASTER_PREFIX)}
    saved = saved_shapes(path)
    if "model" in wanted:
        names = {key.removeprefix(MODEL_PREFIX) for key in saved if key.startswith(MODEL_PREFIX)}
        _compare_names(
            *(optimizer.chunks, names, f"the checkpoint '{path}'", context),
            strict=strict,
            in_files=lambda name: [f"{MODEL_PREFIX}{name}"],
        )
    _log_regrouping(f"the checkpoint '{path}'", tensors, saved, context)
    tensors = in_stored_form(tensors, saved, heads_of(optimizer.chunks))
    stateless = compare_states(context, tensors, saved) if "optimizer" in wanted else set()
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
        reset_masters_of(optimizer, stateless)
    _restore_counters(trainer, state, wanted)
    if tensors.get(rng_key) is not None:
        set_random_state(tensors[rng_key])


def data_state_of(trainer: Trainer) -> dict[str, Any]:
    """State of the train data, merged over the ranks where each rank knows a part of it; collective."""
    loader = trainer.train_loader
    if isinstance(loader, MergeableSource):
        return loader.merge_states(of_all_ranks(trainer.context, loader.state_dict()))
    return loader.state_dict() if isinstance(loader, StatefulSource) else {}


def counters_of(trainer: Trainer, data: dict[str, Any]) -> dict[str, Any]:
    """The content of `context.json`; `_restore_counters` is the inverse.

    Args:
        trainer: trainer to save.
        data: see `data_state_of`.
    """
    optimizer = trainer.engine.optimizer
    return {
        "state": asdict(trainer.state),
        "inf_nan_skip_batches": float(trainer.num_skipped_updates),
        "bad_documents": float(trainer.num_bad_documents),
        "num_updates": optimizer.num_updates,
        "scaler": optimizer.scaler.state_dict(),
        # The cursor of the loader is the trainer's own.
        "data": data,
        "hooks": trainer.hook_states(),
        "world_size": trainer.context.world_size,
        "layout": trainer.context.layout.describe(),
    }


def _restore_counters(trainer: Trainer, state: dict[str, Any], wanted: set[str]) -> None:
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
        trainer.num_bad_documents.fill_(state.get("bad_documents", 0.0))
        if isinstance(trainer.train_loader, StatefulSource) and state.get("data"):
            trainer.train_loader.load_state_dict(state["data"])
    if wanted == set(WHOLE_RUN):
        saved_hooks: dict[str, Any] = dict(state["hooks"])
        for hook in trainer.hooks:
            if hook.name in saved_hooks:
                trainer.progress.mark(f"{hook.name}: load_state_dict")
                hook.load_state_dict(saved_hooks.pop(hook.name))
        unused = sorted(name for name, saved_state in saved_hooks.items() if saved_state)
        if unused:
            logger.warning("the checkpoint has the state of hooks that this run lacks: %s", ", ".join(unused))


def load_weights(
    trainer: Trainer,
    source: WeightSource,
    what: str,
    *,
    strict: bool = True,
    needs: Callable[[str], bool] = lambda name: True,
) -> None:
    """Load weights of another format into a trainer, one tensor at a time; collective. fp32 masters are reset.

    Args:
        trainer: freshly built, before its first step.
        source: weights under our names.
        what: the source, for messages.
        strict: see `CheckpointManager.load`.
        needs: which weights of the model the source must have; others may keep their values.

    Raises:
        CheckpointError: the weights do not fit.
    """
    optimizer = trainer.engine.optimizer
    names = set(source.names())
    lacking = source.lacking if isinstance(source, FileNames) else {}
    _compare_names(
        *(optimizer.chunks, names, what, trainer.context),
        strict=strict,
        needs=needs,
        in_files=lambda name: lacking.get(name, [name]),
    )
    shapes = {name: tuple(source.shape(name)) for name in names}
    tensors = {key.removeprefix(MODEL_PREFIX): boxed for key, boxed in model_tensors(*optimizer.chunks).items()}
    _log_regrouping(what, tensors, names, trainer.context)
    tensors = in_stored_form(tensors, shapes, heads_of(optimizer.chunks))
    wanted = {name: boxed for name, boxed in tensors.items() if name in names}
    misfits = [
        f"'{name}' has shape {list(shapes[name])}, the model expects {list(boxed.size())}"
        for name, boxed in wanted.items()
        if shapes[name] != tuple(boxed.size())
    ]
    if misfits:
        raise CheckpointError(f"{what} does not fit this model:{listed(misfits)}")
    for name, boxed in wanted.items():
        whole: Tensor = finite(source.read(name), name, what)
        for box, piece in boxed.pieces:
            piece.copy_(finite(whole[box.global_slices()], name, what, piece.dtype))
    optimizer.reset_masters()


def _compare_names(
    chunks: Iterable[nn.Module],
    found: set[str],
    what: str,
    context: ParallelContext,
    *,
    strict: bool,
    in_files: Callable[[str], Sequence[str]],
    needs: Callable[[str], bool] = lambda name: True,
) -> None:
    """Compare the names of the whole model with those in a source of weights; collective.

    Args:
        in_files: name of the model -> names that the files of the source have for it, or lack.

    Raises:
        CheckpointError: they differ, and `strict`.
    """
    own = {shard_spec_of(parameter).name for chunk in chunks for parameter in chunk.parameters()}
    names = {stored for name in set().union(*of_all_ranks(context, own)) for stored in stored_names(name, found)}
    missing = (name for name in sorted(names - found) if needs(name))
    lines = [f"'{name}' is missing" for name in dict.fromkeys(each for name in missing for each in in_files(name))]
    lines += [f"'{each}' is not part of the model" for name in sorted(found - names) for each in in_files(name)]
    if not lines:
        return
    if strict:
        raise CheckpointError(f"{what} does not fit this model (to load what fits, set strict=False):{listed(lines)}")
    logger.warning("%s does not fit this model completely; only what fits is loaded:%s", what, listed(lines))


def _log_regrouping(what: str, keys: Iterable[str], found: Collection[str], context: ParallelContext) -> None:
    """Name the projections that a source stores fused and the model holds apart, or the other way round; collective."""
    own = [key for key in keys if stored_names(key, found) != (key,)]
    lines = describe_regrouping(set().union(*of_all_ranks(context, own)), found)
    if lines:
        logger.info(
            "%s stores these projections in another form than the model; they are regrouped:%s", what, listed(lines)
        )
