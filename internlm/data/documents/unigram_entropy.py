"""Token frequencies of documents and their entropy, a baseline for the training loss."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from internlm.data.documents.document_file import DocumentFile


def token_counts(files: Iterable[DocumentFile], vocab_size: int) -> NDArray[np.int64]:
    """Count how often each id occurs in files: int64 [vocab_size].

    Raises:
        DataError: a file is malformed or has an id outside the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for file in files:
        for document in range(len(file)):
            counts += np.bincount(file.read(document)[0], minlength=vocab_size)
    return counts


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Entropy of the id distribution, in nats per token: the loss of the best model that ignores the context."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
