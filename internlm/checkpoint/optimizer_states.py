"""Compares the optimizer state in a checkpoint with that of a run in which other parameters may be frozen."""

from __future__ import annotations

from collections.abc import Collection

import torch

from internlm.checkpoint.fused_weights import other_form
from internlm.checkpoint.reading import listed
from internlm.core.communication.objects import of_all_ranks
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.optimizer_protocol import Optimizer
from internlm.core.parallel.fsdp import local_tensor
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

OPTIMIZER_PREFIX = "optimizer/"
MASTER_PREFIX = f"{OPTIMIZER_PREFIX}master/"


def compare_states(context: ParallelContext, wanted: Collection[str], saved: Collection[str]) -> set[str]:
    """Report parameters that are trained now and were frozen in the checkpoint, and the other way round; collective.

    Args:
        context: where this rank stands.
        wanted: keys of the tensors that this rank expects.
        saved: keys of the checkpoint.

    Returns:
        Names of the parameters whose state the checkpoint lacks.

    Raises:
        CheckpointError: the checkpoint has only a part of the state of a parameter, or no state at all: it was saved
            with another optimizer.
    """
    own = {key for key in wanted if key.startswith(OPTIMIZER_PREFIX)}
    own = set().union(*of_all_ranks(context, own))
    absent = own - set(saved)
    missing = sorted(map(_parameter_of, absent))
    found = set(map(_parameter_of, own & set(saved)))
    if missing and (not found or not found.isdisjoint(missing)):
        lines = [f"'{key}' is missing" for key in sorted(absent)]
        raise CheckpointError(f"the optimizer state of the checkpoint does not fit this optimizer:{listed(lines)}")
    trained = set(map(_parameter_of, own))
    dropped = sorted({_parameter_of(key) for key in saved if key.startswith(OPTIMIZER_PREFIX)} - trained)
    missing = sorted(set(missing))
    incomplete = [name for name in dropped if not set(missing).isdisjoint(other_form(name))]
    dropped = [name for name in dropped if name not in incomplete]
    if missing:
        logger.warning(
            "%d parameters start with an empty optimizer state, as the checkpoint has none for them: %s",
            len(missing),
            ", ".join(missing),
        )
    if dropped:
        logger.warning(
            "%d parameters are frozen now, so their optimizer state is not loaded: %s", len(dropped), ", ".join(dropped)
        )
    if incomplete:
        logger.warning(
            "the optimizer state of %d projections is not loaded, as the checkpoint lacks that of the projections that "
            "are fused with them here: %s",
            len(incomplete),
            ", ".join(incomplete),
        )
    return set(missing)


@torch.no_grad()
def reset_masters_of(optimizer: Optimizer, names: Collection[str]) -> None:
    """Copy the named parameters into their masters, if they have any."""
    for key, parameter, pieces in optimizer.sharded_state():
        kind, _, name = key.partition("/")
        if kind == "master" and name in names:
            for box, piece in pieces:
                piece.copy_(local_tensor(parameter)[box.local_slices()])


def _parameter_of(key: str) -> str:
    return key.removeprefix(OPTIMIZER_PREFIX).partition("/")[2]
