"""What a rank holds of a parameter: the single source from which all bookkeeping is derived.

A `ShardSpec` describes which boxes of the global tensor the local tensor covers. Initialization, gradient reduction,
optimizer sharding, the gradient norm and checkpoints read it; none of them knows a parallel mode by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from torch import Tensor, nn

Index = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A rectangular piece of a tensor, in global and in local coordinates.

    Attributes:
        global_offset: first corner in the global tensor.
        local_offset: first corner in the local tensor.
        size: extent along each dimension, the same in both.
    """

    global_offset: Index
    local_offset: Index
    size: Index

    @property
    def local_stop(self) -> Index:
        """Corner opposite to `local_offset`."""
        return tuple(start + size for start, size in zip(self.local_offset, self.size, strict=True))

    def local_slices(self) -> tuple[slice, ...]:
        """Index of this box in the local tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.local_offset, self.size, strict=True))

    def global_slices(self) -> tuple[slice, ...]:
        """Index of this box in the global tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.global_offset, self.size, strict=True))

    def intersect_global(self, offset: Index, size: Index) -> Box | None:
        """The intersection of this box with a rectangle of the global tensor; None if it is empty."""
        part = Box(self.local_offset, self.global_offset, self.size).intersect_local(offset, size)
        return None if part is None else Box(part.local_offset, part.global_offset, part.size)

    def intersect_local(self, offset: Index, size: Index) -> Box | None:
        """The intersection of this box with a rectangle of the local tensor; None if it is empty."""
        start = [max(a, b) for a, b in zip(self.local_offset, offset, strict=True)]
        stop = [min(a + n, b + m) for a, n, b, m in zip(self.local_offset, self.size, offset, size, strict=True)]
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        moved = tuple(g + a - b for g, a, b in zip(self.global_offset, start, self.local_offset, strict=True))
        return Box(moved, tuple(start), tuple(b - a for a, b in zip(start, stop, strict=True)))


@dataclass(frozen=True)
class ShardSpec:
    """Which part of a global parameter this rank holds.

    Attributes:
        name: global name, the same on every rank and in every layout.
        global_shape: shape of the whole parameter.
        local_shape: shape of this rank's tensor.
        boxes: the pieces of the global tensor that fill the local one.
        view: the rank view that the axes belong to.
        data_axis: the axis of `view` whose ranks hold the same weights and process different tokens; gradients are
            summed over it, and its inner `zero` sub-axis shards the optimizer state.
        sharded_over: axes of `view` whose ranks hold different boxes; the parameter is replicated over all others.
        partial_over: axes over which the parameter is replicated, but each rank computes only a part of the gradient
            (such as norms under sequence parallelism); the gradient is summed over them too.
    """

    name: str
    global_shape: Index
    local_shape: Index
    boxes: tuple[Box, ...]
    view: str = "weight"
    data_axis: str = "data"
    sharded_over: tuple[str, ...] = ()
    partial_over: tuple[str, ...] = ()

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> ShardSpec:
        """The spec of a parameter that is replicated on all ranks."""
        shape = tuple(shape)
        origin = (0,) * len(shape)
        return cls(name, shape, shape, (Box(origin, origin, shape),))

    @property
    def is_whole(self) -> bool:
        """Whether the local tensor is the global one."""
        return self.local_shape == self.global_shape

    def boxes_of_flat_range(self, start: int, stop: int) -> Iterator[Box]:
        """The boxes covered by elements `start` to `stop` of the flattened local tensor.

        ZeRO splits flat buffers at any element. A range of a row-major tensor consists of a partial first row, full
        rows and a partial last row, recursively; each is intersected with the boxes of this spec.
        """
        for offset, size in _rectangles(self.local_shape, start, stop):
            for box in self.boxes:
                part = box.intersect_local(offset, size)
                if part is not None:
                    yield part

    def padding(self) -> Iterator[tuple[Index, Index]]:
        """(offset, size) of the rectangles of the local tensor that no box covers, such as vocabulary padding.

        The edges of all boxes cut the tensor into cells, each of which is inside one box or outside of all.
        """
        edges = [
            sorted({0, extent, *(edge for box in self.boxes for edge in (box.local_offset[d], box.local_stop[d]))})
            for d, extent in enumerate(self.local_shape)
        ]
        for cell in product(*(pairwise(cuts) for cuts in edges)):
            offset = tuple(start for start, _ in cell)
            size = tuple(stop - start for start, stop in cell)
            if all(box.intersect_local(offset, size) is None for box in self.boxes):
                yield offset, size


def _rectangles(shape: Index, start: int, stop: int) -> Iterator[tuple[Index, Index]]:
    """(offset, size) of the rectangles that make up the flat range of a row-major tensor."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = 1
    for extent in shape[1:]:
        row *= extent
    first, last = start // row, (stop - 1) // row
    if first == last and (start > first * row or stop < (first + 1) * row):
        for offset, size in _rectangles(shape[1:], start - first * row, stop - first * row):
            yield (first, *offset), (1, *size)
        return
    whole_start = first if start == first * row else first + 1
    whole_stop = last + 1 if stop == (last + 1) * row else last
    if whole_start > first:
        yield from _rectangles(shape, start, whole_start * row)
    if whole_stop > whole_start:
        yield (whole_start,) + (0,) * (len(shape) - 1), (whole_stop - whole_start, *shape[1:])
    if whole_stop <= last:
        yield from _rectangles(shape, whole_stop * row, stop)


def attach_shard_spec(parameter: nn.Parameter, spec: ShardSpec) -> None:
    """Set the ShardSpec of `parameter`."""
    parameter.shard_spec = spec  # type: ignore[attr-defined]


def shard_spec_of(parameter: Tensor) -> ShardSpec:
    """The ShardSpec of `parameter`.

    Raises:
        ValueError: the model was not passed through `parallelize`.
    """
    spec: ShardSpec | None = getattr(parameter, "shard_spec", None)
    if spec is None:
        raise ValueError(
            "a parameter has no ShardSpec: pass the model through internlm.core.parallel.parallelize first"
        )
    return spec
