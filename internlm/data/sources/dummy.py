"""Random samples for runs without data (`train_folder=None`): benchmarks and smoke tests.

A sample is a pure function of (seed, index). Documents repeat a short range of ids, so that the loss of a model falls;
with a vision tower, around one picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from internlm.data.images.image_source import RandomImage
from internlm.data.images.settings import ImageSettings
from internlm.data.packing.document_slice import DocumentSlice, make_slice
from internlm.data.packing.sample import (
    Packing,
    Sample,
    check_document_mask,
    concatenate_slices,
    padding_sample,
    stack_slices,
)
from internlm.data.permutation import derive_key

_NUM_SAMPLES = 100_000
_MAX_PERIOD = 32


class DummySource:
    """Random samples of the types en, cn and code, in turn.

    Args:
        seq_len: maximum length of a document, in tokens.
        micro_bsz: rows of a micro-batch.
        packing: see doc/data.md.
        vocab_size: ids are in [1, vocab_size).
        seed: seed of all samples.
        fixed_lengths: give every document seq_len tokens; otherwise lengths are uniform in [1, seq_len].
        document_mask: whether attention stays within documents; None: the default of the packing.
        images: of the placeholders; documents with room for them then have one picture.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        micro_bsz: int,
        packing: Packing,
        vocab_size: int,
        seed: int,
        fixed_lengths: bool = True,
        document_mask: bool | None = None,
        images: ImageSettings | None = None,
    ) -> None:
        self.document_mask = check_document_mask(packing, document_mask)
        self.type_names = ["en", "cn", "code"]
        self.seq_len, self.micro_bsz, self.packing = seq_len, micro_bsz, packing
        self.vocab_size, self.seed, self.fixed_lengths = vocab_size, seed, fixed_lengths
        self._images = images

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `SampleSource`."""
        return {
            "packing": self.packing,
            "document_mask": self.document_mask,
            "seq_len": self.seq_len,
            "micro_bsz": self.micro_bsz,
        }

    def __len__(self) -> int:
        """Samples of one epoch."""
        return _NUM_SAMPLES

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """Generate sample `index` in [0, len), the same in every epoch."""
        random = np.random.default_rng(derive_key(self.seed, index))
        type_id = index % len(self.type_names)
        if self.packing == "unpacked":
            rows = [self._random_document(random, self.seq_len) for _ in range(self.micro_bsz)]
            return stack_slices(rows, self.seq_len, self.micro_bsz, type_id)
        total = remaining = self.micro_bsz * self.seq_len
        documents = []
        while remaining > 0:
            documents.append(self._random_document(random, min(self.seq_len, remaining)))
            remaining -= len(documents[-1].input_ids)
        return concatenate_slices(documents, self.seq_len, total, self.packing, type_id, self.document_mask)

    def padding(self) -> Sample:
        """Return a sample of padding alone."""
        return padding_sample(self.seq_len, self.micro_bsz, self.packing, self.document_mask)

    def _random_document(self, random: np.random.Generator, max_length: int) -> DocumentSlice:
        images = self._images
        least = 1 if images is None else min(images.tokens_per_image + 2, max_length)
        length = max_length if self.fixed_lengths else int(random.integers(least, max_length + 1))
        period = int(random.integers(1, min(_MAX_PERIOD, self.vocab_size - 1) + 1))
        base = int(random.integers(1, self.vocab_size - period + 1))
        ids = base + np.arange(length, dtype=np.int64) % period
        if images is None or length < images.tokens_per_image + 2:
            return make_slice(ids, np.ones(length, dtype=bool), length)
        start = int(random.integers(1, length - images.tokens_per_image))
        ids[start : start + images.tokens_per_image] = images.token_id
        document = make_slice(ids, ids != images.token_id, length)
        document.images = (RandomImage(int(random.integers(2**63))),)
        return document
