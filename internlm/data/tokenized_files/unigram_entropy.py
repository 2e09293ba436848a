"""Token frequencies of tokenized files and their entropy, a baseline for the training loss."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.data.tokenized_files.reader import TokenizedFile


def token_counts(paths: Iterable[Path], vocab_size: int) -> NDArray[np.int64]:
    """Count how often each id occurs in tokenized files: int64 [vocab_size].

    Raises:
        DataError: a file is malformed or has an id outside the vocabulary.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for path in paths:
        file = TokenizedFile(path, vocab_size)
        for document in range(len(file)):
            counts += np.bincount(file.read(document)[0], minlength=vocab_size)
    return counts


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Entropy of the id distribution, in nats per token: the loss of the best model that ignores the context."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
