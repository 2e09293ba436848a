"""Random samples for runs without data (`train_folder=None`): speed trials and smoke tests.

Owns nothing on disk. A sample is a pure function of (seed, index). Documents repeat a short range of ids, so that a
model that learns shows a falling loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from internlm.data.packing.document_slice import DocumentSlice, make_slice
from internlm.data.packing.sample import Packing, Sample, concatenate_slices, padding_sample, stack_slices
from internlm.data.permutation import derive_key

_NUM_SAMPLES = 100_000
_LONGEST_RANGE = 32


class DummySource:
    """Samples of the types en, cn, code, in turn.

    Args:
        fixed_lengths: every document has seq_len tokens; otherwise lengths are uniform in [1, seq_len].
        vocab_size: ids lie in [1, vocab_size).
    """

    def __init__(
        self, *, seq_len: int, micro_bsz: int, packing: Packing, vocab_size: int, seed: int, fixed_lengths: bool = True
    ) -> None:
        self.type_names = ["en", "cn", "code"]
        self.seq_len, self.micro_bsz, self.packing = seq_len, micro_bsz, packing
        self.vocab_size, self.seed, self.fixed_lengths = vocab_size, seed, fixed_lengths

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `SampleSource`."""
        return {"packing": self.packing, "seq_len": self.seq_len, "micro_bsz": self.micro_bsz}

    def __len__(self) -> int:
        """Number of samples of one epoch."""
        return _NUM_SAMPLES

    def sample(self, index: int) -> Sample:
        """Sample `index` in [0, len)."""
        random = np.random.default_rng(derive_key(self.seed, index))
        type_id = index % len(self.type_names)
        if self.packing == "unpacked":
            rows = [self._document(random, self.seq_len) for _ in range(self.micro_bsz)]
            return stack_slices(rows, self.seq_len, self.micro_bsz, type_id)
        total = self.micro_bsz * self.seq_len
        pieces = []
        while total > 0:
            pieces.append(self._document(random, min(self.seq_len, total)))
            total -= len(pieces[-1].input_ids)
        return concatenate_slices(pieces, self.seq_len, self.micro_bsz * self.seq_len, self.packing, type_id)

    def padding(self) -> Sample:
        """A sample of padding alone."""
        return padding_sample(self.seq_len, self.micro_bsz, self.packing)

    def _document(self, random: np.random.Generator, longest: int) -> DocumentSlice:
        length = longest if self.fixed_lengths else int(random.integers(1, longest + 1))
        period = int(random.integers(1, min(_LONGEST_RANGE, self.vocab_size - 1) + 1))
        base = int(random.integers(1, self.vocab_size - period + 1))
        ids = base + np.arange(length, dtype=np.int64) % period
        return make_slice(ids, np.ones(length, dtype=bool), length)
