"""Where this rank stands, and the process groups it talks through. An explicit object: there is no global one."""

from __future__ import annotations

import datetime
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.rank_view import RankView
from internlm.utils.former_names import explain_former_names

explain_former_names(__name__)


@dataclass
class ParallelContext:
    """One rank's place in a layout.

    Make one with `ParallelContext.create`. With one process no process group is needed and every group is None, which
    the functions of `internlm.core.communication` take as "nothing to do".

    Attributes:
        layout: the degrees of parallelism and the three views.
        rank: this process.
        device: where this rank computes.
        timeout: of one collective, in all groups made here; None takes PyTorch's.
    """

    layout: ParallelLayout
    rank: int
    device: torch.device
    timeout: datetime.timedelta | None = None
    _groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict, repr=False)
    _named_groups: dict[Hashable, tuple[tuple[int, ...], dist.ProcessGroup]] = field(default_factory=dict, repr=False)
    _own: dict[tuple[str, str], dist.ProcessGroup | None] = field(default_factory=dict, repr=False)

    @classmethod
    def create(
        cls,
        layout: ParallelLayout | None = None,
        device: torch.device | str = "cpu",
        timeout_seconds: float | None = None,
    ) -> ParallelContext:
        """The context of this process; collective: every rank of the job must call it with the same layout.

        Args:
            layout: defaults to pure data parallelism over all ranks of the default process group.
            device: where this rank computes.
            timeout_seconds: of one collective; None takes PyTorch's. That of the default group is its maker's matter.

        Raises:
            ConfigError: sizes that do not fit the world size.
            ValueError: the layout is for another number of ranks than were started.
        """
        started = dist.get_world_size() if dist.is_initialized() else 1
        layout = layout or ParallelLayout(world_size=started)
        if layout.world_size != started:
            raise ValueError(f"the layout is for {layout.world_size} ranks, but {started} were started")
        timeout = None if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)
        context = cls(layout, dist.get_rank() if dist.is_initialized() else 0, torch.device(device), timeout)
        for view in layout.views:
            for axis in (*view.axes, *view.merged, "pipeline_ends"):
                context._make_groups(view, axis)
        return context

    def _make_groups(self, view: RankView, axis: str) -> None:
        if view.size(axis) == 1:
            return
        for ranks in view.groups(axis):
            # The same set of ranks may be a group of several views or axes: one process group serves them all.
            if ranks not in self._groups:
                self._groups[ranks] = dist.new_group(list(ranks), timeout=self.timeout)

    def view(self, name: str) -> RankView:
        """The view called "activation", "weight" or "expert"."""
        return next(view for view in self.layout.views if view.name == name)

    def group(self, axis: str, view: str = "activation") -> dist.ProcessGroup | None:
        """The process group of this rank along an axis; None when this rank is alone on it."""
        # Asked for in every layer: the arithmetic is done once.
        if (axis, view) not in self._own:
            ranks = self.view(view).group(axis, self.rank)
            self._own[axis, view] = None if len(ranks) == 1 else self._groups[ranks]
        return self._own[axis, view]

    def make_named_group(self, name: Hashable, ranks: Sequence[int]) -> None:
        """Make a process group for one purpose alone, unless there is one of that name; collective over all ranks."""
        if name not in self._named_groups:
            self._named_groups[name] = tuple(ranks), dist.new_group(list(ranks), timeout=self.timeout)

    def named_group(self, name: Hashable) -> dist.ProcessGroup:
        """A process group of this rank that `make_named_group` made.

        Raises:
            RuntimeError: the context was closed.
        """
        if name not in self._named_groups:
            raise RuntimeError(f"the process group {name} is gone: its ParallelContext was closed")
        return self._named_groups[name][1]

    def size(self, axis: str, view: str = "activation") -> int:
        """Number of ranks along an axis."""
        return self.view(view).size(axis)

    def index(self, axis: str, view: str = "activation") -> int:
        """Position of this rank along an axis."""
        return self.view(view).index(axis, self.rank)

    def num_collectives(self) -> dict[str, int]:
        """How many collectives this rank has begun in each of its groups, by the group's name, equal on all its ranks.

        Asks no device, and may be called from any thread.
        """
        groups = [*self._groups.items(), *self._named_groups.values()]
        own: list[Any] = [group for ranks, group in groups if self.rank in ranks]
        if self.world_group is not None:
            own.append(self.world_group)
        return {group.group_name: group._get_sequence_number_for_group() for group in own}

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return self.layout.world_size

    @property
    def world_group(self) -> dist.ProcessGroup | None:
        """All ranks; None when there is one."""
        return dist.group.WORLD if self.world_size > 1 else None

    @property
    def is_main_rank(self) -> bool:
        """True on the one rank that speaks for the job."""
        return self.rank == 0

    def close(self) -> None:
        """Give back the process groups of this context (not the default group)."""
        for ranks, group in (*self._groups.items(), *self._named_groups.values()):
            if self.rank in ranks:
                dist.destroy_process_group(group)
        self._groups.clear()
        self._named_groups.clear()
        self._own.clear()
