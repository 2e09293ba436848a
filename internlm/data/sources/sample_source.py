"""The protocol of a source of training samples.

A new source is a class with this protocol. Order, ranks, batches, prefetching and the cursor belong to the loader
(`internlm.data.loaders.train_loader`) and are the same for every source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from internlm.data.packing.sample import Sample


class SampleSource(Protocol):
    """Samples by index, each the tokens of one micro-batch. Sources are sent to worker processes.

    Attributes:
        type_names: the names that `Sample.type_ids` index.
        facts: settings that decide the content of samples, as JSON values; saved with the cursor and compared when a
            run resumes. Log messages show "seq_len".
    """

    type_names: list[str]

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int:
        """Samples of one epoch."""

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Return sample `index` in [0, len) of an epoch: the same arrays on every call, in every process."""

    def padding(self) -> Sample:
        """Return a sample of padding alone, for a step whose batch is skipped."""
