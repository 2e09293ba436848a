"""Plain-text tables for the output of commands."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Format rows as aligned columns, one line per row.

    Args:
        rows: cells; the first row is the header.
        alignment: for each column, "<" (left) or ">" (right).
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(alignment))]
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
