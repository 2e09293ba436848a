"""Writes random tokens for a measurement, in this project's format and as an array for the peers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from internlm.data.tokenized_files.writer import TokenizedWriter

ARRAY = "tokens.npy"
LENGTHS = "lengths.npy"
SHORT = 32
"""Average number of short documents per sequence."""


def write_corpus(folder: Path, documents: str, *, vocab: int, seq: int, num_sequences: int) -> None:
    """Write `num_sequences * seq` tokens.

    Args:
        folder: receives `train/en/en.bin`, the same tokens as `tokens.npy`, int64 `[num_sequences, seq]`, and the
            lengths of the documents as `lengths.npy`, int64.
        documents: one of `shapes.DOCUMENTS`.
        vocab: ids are in [1, vocab).
        seq: tokens per sequence.
        num_sequences: number of sequences.
    """
    random = np.random.default_rng(0)
    tokens = random.integers(1, vocab, num_sequences * seq)
    np.save(folder / ARRAY, tokens.reshape(num_sequences, seq))
    longest = {"short": max(1, 2 * seq // SHORT - 1), "mixed": seq}.get(documents)
    with TokenizedWriter(folder / "train" / "en" / "en.bin") as writer:
        lengths, start = [], 0
        while start < len(tokens):
            size = seq if longest is None else int(random.integers(1, longest + 1))
            document = tokens[start : start + size]
            writer.write(document)
            lengths.append(len(document))
            start += size
    np.save(folder / LENGTHS, np.array(lengths))
