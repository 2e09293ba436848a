"""What a run computed, put together from what each of its ranks holds.

Tensors are kept as fp32 NumPy arrays (exact for bf16): they travel between processes as plain bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import Box, ShardSpec

Array = NDArray[np.float32]


@dataclass(frozen=True)
class TensorBox:
    """A box of a global tensor.

    Attributes:
        name: of the global tensor.
        global_shape: of the global tensor.
        offset: first corner of the box in it.
        values: what the box holds.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Array

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the box in the global tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.values.shape, strict=True))


@dataclass
class RankStep:
    """One step as one rank saw it.

    Attributes:
        loss, grad_norm: of the step, equal on every rank.
        gradients: the boxes of the gradients that this rank applied.
        weights: the boxes of the weights after the step.
    """

    loss: float
    grad_norm: float
    gradients: list[TensorBox]
    weights: list[TensorBox]


@dataclass
class RankRecord:
    """A run as one rank saw it.

    Attributes:
        initial: the boxes of the weights before the first step.
        steps: one entry a step.
        placements: for each parameter on this rank, in words over which axes it is split, copied and summed.
    """

    initial: list[TensorBox]
    steps: list[RankStep] = field(default_factory=list)
    placements: dict[str, str] = field(default_factory=dict)


@dataclass
class Step:
    """One step: loss, gradient norm, and global tensors by name."""

    loss: float
    grad_norm: float
    gradients: dict[str, Array]
    weights: dict[str, Array]


@dataclass
class Record:
    """A run, put together.

    Attributes:
        initial: the weights before the first step.
        steps: one entry a step.
        placements: as of a RankRecord, of all ranks.
    """

    initial: dict[str, Array]
    steps: list[Step]
    placements: dict[str, str]


class InconsistentRanksError(Exception):
    """Ranks contradict each other, or leave a part of a tensor to nobody."""


def boxes_of(spec: ShardSpec, boxes: Iterable[tuple[Box, Tensor]]) -> Iterator[TensorBox]:
    """Boxes of a parameter as pieces; the tensors are copied."""
    for box, tensor in boxes:
        yield TensorBox(spec.name, spec.global_shape, box.global_offset, tensor.detach().float().cpu().numpy().copy())


def describe_placement(spec: ShardSpec, context: ParallelContext) -> str:
    """In words, over which axes a parameter is split, copied, and its gradient summed; not axes of one rank."""
    view = context.view(spec.view)
    split = [axis for axis in spec.sharded_over if view.size(axis) > 1]
    summed = [axis for axis in (spec.data_axis, *spec.partial_over) if view.size(axis) > 1]
    inside = {part for axis in split for part in (axis, *view.merged.get(axis, ()))}
    copied = [axis for axis, size in view.axes.items() if size > 1 and axis not in inside and axis != "pipeline"]
    words = {"split over": split, "copied over": copied, "gradient summed over": summed}
    return ", ".join(f"{word} {' x '.join(axes)}" for word, axes in words.items() if axes) or "on one rank"


def join_ranks(ranks: list[RankRecord]) -> Record:
    """Put the records of all ranks together.

    Raises:
        InconsistentRanksError: copies of a part differ in any bit, a part is on no rank, or losses or norms differ.
    """
    steps = []
    placements = {name: words for rank in ranks for name, words in rank.placements.items()}
    initial = join([rank.initial for rank in ranks], "initial weight", placements)
    for number, seen in enumerate(zip(*(rank.steps for rank in ranks), strict=True), start=1):
        for name in ("loss", "grad_norm"):
            values = [getattr(step, name) for step in seen]
            # Not `!=` alone: NaN on every rank is a difference to the reference, not between ranks.
            if len({str(value) for value in values}) > 1:
                raise InconsistentRanksError(f"step {number}: {name} differs between ranks: {values}")
        steps.append(
            Step(
                seen[0].loss,
                seen[0].grad_norm,
                join([step.gradients for step in seen], f"gradient, step {number}", placements),
                join([step.weights for step in seen], f"weight, step {number}", placements),
            )
        )
    return Record(initial, steps, placements)


def join(pieces_by_rank: list[list[TensorBox]], what: str, placements: dict[str, str]) -> dict[str, Array]:
    """The global tensors of which each rank has pieces.

    Args:
        what: they are, and
        placements: where they lie, for the message.

    Raises:
        InconsistentRanksError: copies of a part differ in any bit, or a part is on no rank.
    """
    tensors: dict[str, Array] = {}
    owners: dict[str, NDArray[np.int32]] = {}
    for rank, pieces in enumerate(pieces_by_rank):
        for piece in pieces:
            tensor = tensors.setdefault(piece.name, np.zeros(piece.global_shape, dtype=np.float32))
            owner = owners.setdefault(piece.name, np.full(piece.global_shape, -1, dtype=np.int32))
            if tensor.shape != piece.global_shape:
                raise InconsistentRanksError(
                    f"{what} of {piece.name}: shape {piece.global_shape} on rank {rank}, {tensor.shape} on another"
                )
            there, filled = tensor[piece.slices], owner[piece.slices]
            # Bits, not values: NaN is equal to itself, and 0 and -0 are apart.
            differs = (filled >= 0) & (there.view(np.int32) != piece.values.view(np.int32))
            if differs.any():
                amount = np.abs(there - piece.values)[differs].max()
                raise InconsistentRanksError(
                    f"{what} of {piece.name}: copies on rank {filled[differs].flat[0]} and rank {rank} differ by up to "
                    f"{amount:.3g} ({placements.get(piece.name, 'place unknown')})"
                )
            there[...] = piece.values
            filled[filled < 0] = rank
    for name, owner in owners.items():
        missing = int((owner < 0).sum())
        if missing:
            raise InconsistentRanksError(f"{what} of {name}: {missing} of {owner.size} elements are on no rank")
    return tensors
