"""Random tokens on disk for a measurement: in this project's format, and the same as an array for the peers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from internlm.data.tokenized_files.writer import TokenizedWriter

ARRAY = "tokens.npy"
SHORT = 32
"""Documents of a sequence when they are short, on average."""


def write_corpus(folder: Path, documents: str, *, vocab: int, seq: int, num_sequences: int) -> None:
    """Write `num_sequences * seq` tokens.

    Args:
        folder: gets `train/en/en.bin`, and `tokens.npy`, int64 `[num_sequences, seq]`, the same tokens in this order.
        documents: one of `shapes.DOCUMENTS`.
        vocab: ids are in [1, vocab).
    """
    random = np.random.default_rng(0)
    tokens = random.integers(1, vocab, num_sequences * seq)
    np.save(folder / ARRAY, tokens.reshape(num_sequences, seq))
    longest = {"short": max(1, 2 * seq // SHORT - 1), "mixed": seq}.get(documents)
    with TokenizedWriter(folder / "train" / "en" / "en.bin") as writer:
        start = 0
        while start < len(tokens):
            size = seq if longest is None else int(random.integers(1, longest + 1))
            writer.write(tokens[start : start + size])
            start += size
