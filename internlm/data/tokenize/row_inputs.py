"""Reads rows (records with several columns) from json, jsonl and parquet files, in bounded memory.

Owns the places that errors name. Must not know what the columns mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from internlm.data.tokenize.json_values import iterate_json_array, parse_line
from internlm.data.tokenize.text_inputs import BLANK, PARQUET_ROWS, Extent, open_parquet, read_lines
from internlm.utils.errors import DataError


def read_rows(
    extent: Extent,
    counts: Counter[str],
    columns: Container[str],
    skip: Callable[[DataError], None] | None = None,
) -> Iterator[tuple[str, int, Any]]:
    """Iterate over the rows of an extent, as (file and position, position, row).

    A position is the number of the row; in JSON lines, the byte at which it starts.

    Args:
        extent: the part of a file to read.
        counts: incremented for blank lines.
        columns: columns to read from a parquet file; all, if it has none of them.
        skip: called with the error of a line that is not JSON, which is then left out; None raises it.

    Raises:
        DataError: the file has text instead of rows, bytes that are not UTF-8, or a line that is not JSON.
    """
    path = Path(extent.path)
    if extent.format == "parquet":
        file = open_parquet(path)
        number = sum(file.metadata.row_group(group).num_rows for group in range(extent.start))
        groups = list(range(extent.start, extent.stop))
        chosen = [name for name in file.schema_arrow.names if name in columns] or None
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups, columns=chosen):
            for row in batch.to_pylist():
                yield f"{path}: row {number}", number, row
                number += 1
    elif extent.format == "json":
        for number, row in enumerate(iterate_json_array(path)):
            yield f"{path}: record {number}", number, row
    elif extent.format == "jsonl":
        for offset, line in read_lines(path, extent):
            if line.isspace():
                counts[BLANK] += 1
            else:
                try:
                    row = parse_line(line, path, offset)
                except DataError as error:
                    if skip is None:
                        raise
                    skip(error)
                    continue
                yield f"{path}: the record at byte {offset}", offset, row
    else:
        raise DataError(f"{path}: {extent.format} files have no columns; conversations need .jsonl, .json or .parquet")
