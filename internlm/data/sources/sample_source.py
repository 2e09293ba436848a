"""The protocol of a source of training samples, and the source that a train folder names.

A new source is a class with this protocol; order, ranks, batches, prefetching and the cursor are the loader's
(`internlm.data.loaders.train_loader`), and the same for every source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from internlm.data.packing.sample import Sample


class SampleSource(Protocol):
    """Numbered samples, each the tokens of one micro-batch. It is pickled into worker processes.

    Attributes:
        type_names: names of the types that `Sample.type_ids` index.
        facts: what decides the content of samples, as JSON values: saved with the cursor, and compared when a run
            resumes. Messages use "seq_len".
    """

    type_names: list[str]

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def __len__(self) -> int:
        """Number of samples of one epoch."""

    def sample(self, index: int) -> Sample:
        """Sample `index` in [0, len): the same arrays every time, in every process."""

    def padding(self) -> Sample:
        """A sample of padding alone, for a step whose batch is not read."""
