"""Weight gradients that are computed or delivered later than autograd would: by a zero-bubble schedule, or when a
collective ends. One such object serves all chunks of a rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

Task = Callable[[], None]


class WeightGradients:
    """Two queues: weight gradients yet to be computed, and computed ones yet to be delivered.

    Zero-bubble schedules split a backward pass: the gradient of the input first, that of the weights when there is time
    (Qi et al. 2024, arXiv:2401.10241). Parallel linear layers hand the second half to `compute`.
    """

    def __init__(self) -> None:
        self._later: dict[Hashable, list[Task]] = {}
        self._collecting: list[Task] | None = None
        self._deliveries: deque[Task] = deque()

    @contextmanager
    def postpone(self, key: Hashable) -> Iterator[None]:
        """Inside, weight gradients are not computed but kept under `key` (of a chunk and micro batch)."""
        previous, self._collecting = self._collecting, self._later.setdefault(key, [])
        try:
            yield
        finally:
            self._collecting = previous

    @property
    def is_postponing(self) -> bool:
        """Whether `compute` keeps its task for later."""
        return self._collecting is not None

    def compute(self, task: Task) -> None:
        """Compute and deliver a weight's gradient: now, or when `run` is called with the key of `postpone`."""
        if self._collecting is None:
            task()
        else:
            self._collecting.append(task)

    def run(self, key: Hashable) -> None:
        """Compute what was kept under `key`."""
        for task in self._later.pop(key):
            task()

    def deliver_later(self, delivery: Task, *, keep: int = 1) -> None:
        """Note a gradient whose collective is running; `delivery` waits for it and hands it over.

        All but the `keep` newest are delivered at once, so that few buffers are alive.
        """
        self._deliveries.append(delivery)
        while len(self._deliveries) > keep:
            self._deliveries.popleft()()

    def finish(self) -> None:
        """Deliver all that is under way; call it at the end of a step's backward passes."""
        while self._deliveries:
            self._deliveries.popleft()()

    def check_empty(self) -> None:
        """Raise when the gradients of some key were never computed: the schedule forgot an action."""
        if self._later or self._deliveries:
            raise RuntimeError(f"weight gradients were never computed: {list(self._later)}")
