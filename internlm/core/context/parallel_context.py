"""A rank's position in the layout, and its process groups. An explicit object: there is no global one."""

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
    """One rank's position in a layout. Use `create` to make one.

    In a run of one process, every group is None; for the functions of `internlm.core.communication`, None is a group of
    one rank.

    Attributes:
        layout: the degrees of parallelism and the three views.
        rank: global rank of this process.
        device: device of this rank.
        timeout: of a collective, for the groups of this context; None: PyTorch's default.
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
        """Create the context of this process and its groups; collective: all ranks call it with the same layout.

        Args:
            layout: None for pure data parallelism over all ranks of the default process group.
            device: device of this rank.
            timeout_seconds: of a collective; None: PyTorch's default. Does not apply to the default group.

        Raises:
            ConfigError: the sizes do not fit the world size.
            ValueError: the layout is for a different number of ranks.
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
            # Several views or axes may have a group of the same ranks: they share one process group.
            if ranks not in self._groups:
                self._groups[ranks] = dist.new_group(list(ranks), timeout=self.timeout)

    def view(self, name: str) -> RankView:
        """The view called "activation", "weight" or "expert"."""
        return next(view for view in self.layout.views if view.name == name)

    def group(self, axis: str, view: str = "activation") -> dist.ProcessGroup | None:
        """This rank's process group along an axis; None for a group of one."""
        # Called in every layer, so the result is cached.
        if (axis, view) not in self._own:
            ranks = self.view(view).group(axis, self.rank)
            self._own[axis, view] = None if len(ranks) == 1 else self._groups[ranks]
        return self._own[axis, view]

    def make_named_group(self, name: Hashable, ranks: Sequence[int]) -> None:
        """Create a process group for one purpose, unless one of that name exists; collective over all ranks."""
        if name not in self._named_groups:
            self._named_groups[name] = tuple(ranks), dist.new_group(list(ranks), timeout=self.timeout)

    def has_named_group(self, name: Hashable) -> bool:
        """Whether `make_named_group` has created a group of this name."""
        return name in self._named_groups

    def named_group(self, name: Hashable) -> dist.ProcessGroup:
        """A process group created by `make_named_group`.

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
        """The number of collectives that this rank has started in each of its groups, by group name.

        A group has the same name on all its ranks. Does not use the device; may be called from any thread.
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
        """The group of all ranks; None in a run of one process."""
        return dist.group.WORLD if self.world_size > 1 else None

    @property
    def is_main_rank(self) -> bool:
        """Whether this is rank 0, which logs and writes for the job."""
        return self.rank == 0

    def close(self) -> None:
        """Destroy the process groups of this context (not the default group)."""
        for ranks, group in (*self._groups.items(), *self._named_groups.values()):
            if self.rank in ranks:
                dist.destroy_process_group(group)
        self._groups.clear()
        self._named_groups.clear()
        self._own.clear()
