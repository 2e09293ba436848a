"""The protocol of an endless sequence of samples, which a train loader deals to ranks.

Sample g is a pure function of (files, settings, seed, g), not of the ranks, of the worker processes, or of what was
read before. A stream may remember where it is, so that ascending indices are cheap.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from internlm.data.packing.sample import Sample
from internlm.data.sources.sample_order import sample_order
from internlm.data.sources.sample_source import SampleSource
from internlm.utils.errors import DataError

_ORDER_BLOCK = 256
"""Indices whose order is evaluated together, as NumPy's overhead is that of one."""


class StreamEndError(DataError):
    """A stream ends, as its settings ask for, such as after the last epoch of a source."""


class NoDocumentsError(DataError):
    """So many documents in sequence cannot be used that leaving out the present one would not help."""


class SampleStream(Protocol):
    """Samples 0, 1, 2, ... without end. Streams are sent to worker processes, each of which reads some of the samples.

    Attributes:
        type_names: names that the type ids of samples index.
        facts: settings that decide the content of samples, as JSON values; saved with the cursor and compared when a
            run resumes.
        samples_per_epoch: None where no number is known, or sources have epochs of their own.
    """

    @property
    def type_names(self) -> list[str]: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def samples_per_epoch(self) -> int | None: ...

    def sample(self, index: int) -> Sample:
        """Return sample `index`: the same arrays on every call, in every process. Indices ascend within a process.

        Raises:
            DataError: the sample cannot be read.
            StreamEndError: the stream ends before it.
        """

    def shard_of(self, index: int) -> Hashable:
        """The shard of a sample, of which one process reads all samples at the lowest cost; None: any process may."""

    def padding(self) -> Sample:
        """Return a sample of padding alone, for a step whose batch is skipped."""

    def note_delivered(self, indices: Sequence[int], cursors: Sequence[Any]) -> None:
        """Note in the process of the consumer that samples have been delivered: their indices and `Sample.cursor`s."""

    def state_at(self, index: int) -> dict[str, Any]:
        """What makes sample `index` and those after it cheap to read in another run; JSON values.

        All samples of this rank below `index` have been delivered.
        """

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state of all ranks, of which each saw its own samples."""

    def load_state(self, index: int, state: Mapping[str, Any]) -> list[str]:
        """Continue at sample `index` with a state of `merge_states`, maybe of a run with other settings.

        Returns:
            What differs from that run, and what it means for the samples from `index` on; one sentence each.
        """

    def progress_at(self, index: int) -> dict[str, float]:
        """Samples and epochs of each source after `index` samples, by the name of a metric."""


@runtime_checkable
class FiniteStream(Protocol):
    """A stream that may end, and knows where without reading."""

    def why_ended(self, index: int) -> str | None:
        """Why the stream has fewer than `index` samples; None if it has as many. Called with ascending indices."""


class StatelessStream:
    """The members of a `SampleStream` whose samples are read in any order, at the same cost, without a state."""

    def shard_of(self, index: int) -> None:
        """See `SampleStream`."""

    def note_delivered(self, indices: Sequence[int], cursors: Sequence[Any]) -> None:
        """See `SampleStream`."""

    def state_at(self, index: int) -> dict[str, Any]:
        """See `SampleStream`."""
        return {}

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See `SampleStream`."""
        return {}

    def load_state(self, index: int, state: Mapping[str, Any]) -> list[str]:
        """See `SampleStream`."""
        if not state:
            return []
        return [f"the checkpoint has the state of another kind of data: this source continues at its sample {index:,}"]

    def progress_at(self, index: int) -> dict[str, float]:
        """See `SampleStream`."""
        return {}


class ShuffledSource(StatelessStream):
    """The samples of a `SampleSource`, in another order in every epoch.

    Args:
        source: finite.
        seed: of the order.
    """

    def __init__(self, source: SampleSource, seed: int) -> None:
        self.source, self.seed = source, seed
        self._block = -1
        self._order = np.zeros(0, dtype=np.int64)

    @property
    def type_names(self) -> list[str]:
        """See `SampleStream`."""
        return self.source.type_names

    @property
    def samples_per_epoch(self) -> int:
        """See `SampleStream`."""
        return len(self.source)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts of the source, the seed and the samples of one epoch.

        Raises:
            ValueError: the source has facts of these names.
        """
        own = {"seed": self.seed, "num_samples_per_epoch": len(self.source)}
        reserved = self.source.facts.keys() & own.keys()
        if reserved:
            raise ValueError(f"a source must not name its facts {sorted(reserved)}: its order has such facts")
        return {**self.source.facts, **own}

    def sample(self, index: int) -> Sample:
        """See `SampleStream`."""
        block, within = divmod(index, _ORDER_BLOCK)
        if block != self._block:
            indices = np.arange(block * _ORDER_BLOCK, (block + 1) * _ORDER_BLOCK, dtype=np.int64)
            self._block, self._order = block, sample_order(indices, len(self.source), self.seed)
        return self.source.sample(int(self._order[within]), index // len(self.source))

    def padding(self) -> Sample:
        """See `SampleStream`."""
        return self.source.padding()
