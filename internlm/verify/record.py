"""The results of a run, assembled from the boxes of its ranks.

Tensors are stored as fp32 NumPy arrays, which represent bf16 exactly and are sent between processes as plain bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

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
        offset: lowest index of the box in the global tensor.
        values: content of the box.
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
    """Results of one step on one rank.

    Attributes:
        loss: of the step, equal on every rank.
        grad_norm: global gradient norm, equal on every rank.
        gradients: boxes of the gradients that this rank applied.
        weights: boxes of the weights after the step.
        routing: metrics of routers, `moe/...`, equal on every rank; empty for a dense model.
    """

    loss: float
    grad_norm: float
    gradients: list[TensorBox]
    weights: list[TensorBox]
    routing: dict[str, float] = field(default_factory=dict)


@dataclass
class RankRecord:
    """Results of a run on one rank.

    Attributes:
        initial: boxes of the weights before the first step.
        steps: one entry per step.
        placements: for each parameter on this rank, the text of `describe_placement`.
    """

    initial: list[TensorBox]
    steps: list[RankStep] = field(default_factory=list)
    placements: dict[str, str] = field(default_factory=dict)


@dataclass
class Step:
    """One step: loss, gradient norm, global tensors by name, and metrics of routers by name."""

    loss: float
    grad_norm: float
    gradients: dict[str, Array]
    weights: dict[str, Array]
    routing: dict[str, float] = field(default_factory=dict)


@dataclass
class Record:
    """Results of a run, as global tensors.

    Attributes:
        initial: the weights before the first step.
        steps: one entry per step.
        placements: those of the RankRecords of all ranks.
    """

    initial: dict[str, Array]
    steps: list[Step]
    placements: dict[str, str]


class InconsistentRanksError(Exception):
    """Ranks disagree, or a part of a tensor is on no rank."""


def boxes_of(spec: ShardSpec, boxes: Iterable[tuple[Box, Tensor]]) -> Iterator[TensorBox]:
    """Copy the boxes of a parameter into TensorBoxes."""
    for box, tensor in boxes:
        yield TensorBox(spec.name, spec.global_shape, box.global_offset, tensor.detach().float().cpu().numpy().copy())


def describe_placement(spec: ShardSpec, context: ParallelContext) -> str:
    """Name the axes over which a parameter is split and copied, and its gradient summed, without axes of one rank."""
    view = context.view(spec.view)
    split = [axis for axis in spec.sharded_over if view.size(axis) > 1]
    summed = [axis for axis in (spec.data_axis, *spec.partial_over) if view.size(axis) > 1]
    inside = {part for axis in split for part in (axis, *view.merged.get(axis, ()))}
    copied = [axis for axis, size in view.axes.items() if size > 1 and axis not in inside and axis != "pipeline"]
    words = {"split over": split, "copied over": copied, "gradient summed over": summed}
    return ", ".join(f"{word} {' x '.join(axes)}" for word, axes in words.items() if axes) or "on one rank"


def join_ranks(ranks: list[RankRecord]) -> Record:
    """Assemble the records of all ranks.

    Raises:
        InconsistentRanksError: copies of a part are not bit-equal, a part is on no rank, or losses, norms or metrics of
            routers differ.
    """
    steps = []
    placements = {name: words for rank in ranks for name, words in rank.placements.items()}
    initial = join([rank.initial for rank in ranks], "initial weight", placements)
    for number, seen in enumerate(zip(*(rank.steps for rank in ranks), strict=True), start=1):
        for name in ("loss", "grad_norm", "routing"):
            values = [getattr(step, name) for step in seen]
            # Compared as text: NaN on every rank is a difference to the reference, not between ranks.
            if len({str(value) for value in values}) > 1:
                raise InconsistentRanksError(f"step {number}: {name} differs between ranks: {values}")
        steps.append(
            Step(
                seen[0].loss,
                seen[0].grad_norm,
                join([step.gradients for step in seen], f"gradient, step {number}", placements),
                join([step.weights for step in seen], f"weight, step {number}", placements),
                seen[0].routing,
            )
        )
    return Record(initial, steps, placements)


def join(boxes_by_rank: list[list[TensorBox]], what: str, placements: dict[str, str]) -> dict[str, Array]:
    """Assemble global tensors from the boxes of all ranks.

    Args:
        boxes_by_rank: for each rank, its boxes.
        what: kind of the tensors, for messages.
        placements: of each tensor, for messages.

    Raises:
        InconsistentRanksError: copies of a part are not bit-equal, or a part is on no rank.
    """
    tensors: dict[str, Array] = {}
    owners: dict[str, NDArray[np.int32]] = {}
    for rank, boxes in enumerate(boxes_by_rank):
        for box in boxes:
            tensor = tensors.setdefault(box.name, np.zeros(box.global_shape, dtype=np.float32))
            owner = owners.setdefault(box.name, np.full(box.global_shape, -1, dtype=np.int32))
            if tensor.shape != box.global_shape:
                raise InconsistentRanksError(
                    f"{what} of {box.name}: shape {box.global_shape} on rank {rank}, {tensor.shape} on another"
                )
            # The ellipsis makes a view of a scalar, too.
            part: tuple[Any, ...] = (*box.slices, ...)
            present, owned = tensor[part], owner[part]
            # Compare bits, not values: NaN equals itself, and 0 differs from -0.
            differs = (owned >= 0) & (present.view(np.int32) != box.values.view(np.int32))
            if differs.any():
                amount = np.abs(present - box.values)[differs].max()
                raise InconsistentRanksError(
                    f"{what} of {box.name}: copies on rank {owned[differs].flat[0]} and rank {rank} differ by up to "
                    f"{amount:.3g} ({placements.get(box.name, 'placement unknown')})"
                )
            present[...] = box.values
            owned[owned < 0] = rank
    for name, owner in owners.items():
        missing = int((owner < 0).sum())
        if missing:
            raise InconsistentRanksError(f"{what} of {name}: {missing} of {owner.size} elements are on no rank")
    return tensors
