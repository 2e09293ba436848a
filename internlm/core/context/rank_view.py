"""Named axes over the ranks of a job. Pure arithmetic, without process groups.

A view arranges the ranks 0 .. world_size - 1 as an array with named axes, outermost first; consecutive ranks differ in
the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class RankView:
    """An arrangement of all ranks into named axes.

    Attributes:
        name: "activation", "weight" or "expert".
        axes: axis name -> size, outermost first; the product is the world size.
        merged: name -> the consecutive axes that it combines, such as `{"data": ("data_replica", "zero")}`.
    """

    name: str
    axes: Mapping[str, int]
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.axes.values())

    def _ends_of(self, axis: str) -> str | None:
        """The axis of a name `<axis>_ends`; None for any other name."""
        base = axis.removesuffix("_ends")
        return base if axis != base and base in self.axes else None

    def _members(self, axis: str) -> tuple[str, ...]:
        members = self.merged.get(axis, (axis,))
        missing = [member for member in members if member not in self.axes]
        if missing:
            raise KeyError(f"the {self.name} view has no axis '{axis}', only {[*self.axes, *self.merged]}")
        return members

    def size(self, axis: str) -> int:
        """Number of ranks along an axis (or merged axis); for `<axis>_ends`: 2, or 1 where both ends are one."""
        base = self._ends_of(axis)
        if base is not None:
            return min(self.axes[base], 2)
        return math.prod(self.axes[member] for member in self._members(axis))

    def coordinate(self, rank: int) -> dict[str, int]:
        """Position of a rank along every axis."""
        index = np.unravel_index(rank, tuple(self.axes.values()))
        return {axis: int(position) for axis, position in zip(self.axes, index, strict=True)}

    def index(self, axis: str, rank: int) -> int:
        """Position of a rank along an axis (or merged axis)."""
        position = 0
        coordinate = self.coordinate(rank)
        for member in self._members(axis):
            position = position * self.axes[member] + coordinate[member]
        return position

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """All groups of ranks that differ only along `axis`, each in axis order; each rank is in one of them.

        For `<axis>_ends`, the first and the last rank of each group along `axis`.
        """
        base = self._ends_of(axis)
        if base is not None:
            return [(group[0], group[-1]) if len(group) > 1 else group for group in self.groups(base)]
        members = self._members(axis)
        names = list(self.axes)
        array = np.arange(self.world_size).reshape(tuple(self.axes.values()))
        array = np.moveaxis(array, [names.index(member) for member in members], range(-len(members), 0))
        return [tuple(int(rank) for rank in row) for row in array.reshape(-1, self.size(axis))]

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along `axis`, in axis order.

        For `<axis>_ends`: the two ends of that group; a rank between them is a group of its own.
        """
        base = self._ends_of(axis)
        if base is not None:
            ranks = self.group(base, rank)
            ends = tuple(dict.fromkeys((ranks[0], ranks[-1])))
            return ends if rank in ends else (rank,)
        members = self._members(axis)
        coordinate = self.coordinate(rank)
        shape = tuple(self.axes.values())
        members_ranks = []
        for position in np.ndindex(*(self.axes[member] for member in members)):
            coordinate.update(zip(members, position, strict=True))
            members_ranks.append(int(np.ravel_multi_index([coordinate[axis] for axis in self.axes], shape)))
        return tuple(members_ranks)
