"""What the trainer and checkpoints need of a loader of training batches.

Any iterable of `Batch` is a `BatchSource`. The other protocols are optional: a loader that implements one of them is
used through it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from internlm.data.batch import Batch


class BatchSource(Protocol):
    """A source of training batches of one data rank, such as `internlm.data.loaders.train_loader.TrainLoader`."""

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches, from the start or from the position set by `seek`."""


@runtime_checkable
class SeekableSource(Protocol):
    """A source that can start in the middle of a run. Without it, a resumed run reads from the start of the source."""

    def seek(self, step: int, num_consumed_samples: int, /) -> None:
        """Set the position of the next iteration.

        Args:
            step: number of batches read so far.
            num_consumed_samples: number of samples read so far by all data ranks.
        """


@runtime_checkable
class StatefulSource(Protocol):
    """A source with a state in checkpoints, to compare the data of a resumed run with those of the checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Description of the data, saved with checkpoints; plain numbers and strings."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Continue from a state of `state_dict`, and warn if the data differ."""


@runtime_checkable
class MergeableSource(StatefulSource, Protocol):
    """A stateful source of which each data rank knows a part of the state."""

    def merge_states(self, states: Sequence[dict[str, Any]], /) -> dict[str, Any]:
        """Merge the states of all ranks, in rank order, into the one that is saved."""


@runtime_checkable
class ClosableSource(Protocol):
    """A source with resources, such as worker processes, to release when the loop ends."""

    def close(self) -> None:
        """Release all resources."""
