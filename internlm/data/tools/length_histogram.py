"""Histograms of the lengths of documents, as text and as an image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.utils.errors import UserError
from internlm.utils.optional_packages import why_unusable
from internlm.utils.text_table import text_table

_BINS = 48
_BLOCK = 1 << 20
_BAR = 40


@dataclass
class LengthHistogram:
    """Documents and tokens by length, in bins [2^(k-1), 2^k); bin 0 has the empty documents.

    Attributes:
        documents, tokens: int64 [bins].
        longest: tokens of the longest document.
    """

    documents: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, dtype=np.int64))
    tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, dtype=np.int64))
    longest: int = 0

    def add(self, counts: NDArray[np.int64]) -> None:
        """Add documents by their token counts, int64 [n]."""
        bins = np.frexp(counts.astype(np.float64))[1]
        self.documents += np.bincount(bins, minlength=_BINS)
        np.add.at(self.tokens, bins, counts)
        self.longest = max(self.longest, int(counts.max(initial=0)))

    def merged(self, others: Iterable[LengthHistogram]) -> LengthHistogram:
        """The sum of this and others."""
        everything = [self, *others]
        return LengthHistogram(
            np.sum([each.documents for each in everything], axis=0),
            np.sum([each.tokens for each in everything], axis=0),
            max(each.longest for each in everything),
        )

    def text(self) -> list[str]:
        """The bins from the shortest to the longest document, a line for each with a bar by tokens."""
        used = np.flatnonzero(self.documents)
        if not len(used):
            return []
        rows = [("length", "documents", "tokens", "share of tokens")]
        total = max(int(self.tokens.sum()), 1)
        for index in range(int(used[0]), int(used[-1]) + 1):
            share = int(self.tokens[index]) / total
            bar = "#" * max(round(share * _BAR), int(self.tokens[index] > 0))
            rows.append(
                (_range_of(index), f"{self.documents[index]:,}", f"{self.tokens[index]:,}", f"{share:6.1%} {bar}")
            )
        return text_table(rows, ">>><")

    def draw(self, path: Path) -> None:
        """Draw the bins into an image.

        Raises:
            UserError: matplotlib is missing.
        """
        if reason := why_unusable("matplotlib"):
            raise UserError(f"--png needs matplotlib: {reason} (pip install matplotlib)")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        used = np.flatnonzero(self.documents)
        bins = range(int(used[0]), int(used[-1]) + 1) if len(used) else range(1)
        figure = Figure(figsize=(9, 6), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, values, name in zip(
            figure.subplots(2, sharex=True), (self.documents, self.tokens), ("documents", "tokens"), strict=True
        ):
            axes.bar([_range_of(index) for index in bins], [int(values[index]) for index in bins])
            axes.set_ylabel(name)
            axes.tick_params(axis="x", rotation=60)
        figure.supxlabel("tokens of a document")
        figure.savefig(path)


def _range_of(index: int) -> str:
    if index < 2:
        return str(index)
    return f"{1 << (index - 1):,}-{(1 << index) - 1:,}"
