"""Weight gradients that are computed or delivered later than by autograd.

A zero-bubble schedule postpones them, or a collective delivers them when it ends. One `WeightGradients` serves all
chunks of a rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

Task = Callable[[], None]


class WeightGradients:
    """Two queues: weight gradients yet to be computed, and computed ones yet to be delivered.

    Zero-bubble schedules split a backward pass: the gradient of the input first, those of the weights in idle time
    (Qi et al. 2024, arXiv:2401.10241). Parallel linear layers leave the second half to `compute`.
    """

    def __init__(self) -> None:
        self._later: dict[Hashable, list[Task]] = {}
        self._collecting: list[Task] | None = None
        self._deliveries: deque[Task] = deque()

    @contextmanager
    def postpone(self, key: Hashable) -> Iterator[None]:
        """Inside, weight gradients are queued under `key` (of a chunk and micro batch) instead of computed."""
        previous, self._collecting = self._collecting, self._later.setdefault(key, [])
        try:
            yield
        finally:
            self._collecting = previous

    @property
    def is_postponing(self) -> bool:
        """Whether `compute` queues its task."""
        return self._collecting is not None

    def compute(self, task: Task) -> None:
        """Compute and deliver a weight's gradient: now, or when `run` is called with the key of `postpone`."""
        if self._collecting is None:
            task()
        else:
            self._collecting.append(task)

    def run(self, key: Hashable) -> None:
        """Compute what was queued under `key`."""
        for task in self._later.pop(key):
            task()

    def deliver_later(self, delivery: Task, *, keep: int = 1) -> None:
        """Queue a gradient whose collective is running; `delivery` waits for it and delivers it.

        All but the `keep` newest are delivered at once, so that few buffers are alive.
        """
        self._deliveries.append(delivery)
        while len(self._deliveries) > keep:
            self._deliveries.popleft()()

    def finish(self) -> None:
        """Deliver all queued gradients; to be called after the last backward pass of a step."""
        while self._deliveries:
            self._deliveries.popleft()()

    def check_empty(self) -> None:
        """Raise if queued gradients were never computed: the schedule misses an action."""
        if self._later or self._deliveries:
            raise RuntimeError(f"weight gradients were never computed: {list(self._later)}")
