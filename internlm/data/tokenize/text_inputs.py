"""Reads documents from txt, json, jsonl and parquet files, in bounded memory and from any byte range.

Owns the definition of a document, what is skipped and counted, and the partition of inputs into shards of about equal
size. Must not know tokenizers.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm.data.conversations.row_forms import fitting_forms
from internlm.data.tokenize.input_files import is_compressed, open_input
from internlm.data.tokenize.json_values import decode_utf8, iterate_json_array, parse_line
from internlm.utils.errors import DataError, nearest

PARQUET_ROWS = 256
BLANK, EMPTY, NULL = "blank lines", "empty texts", "texts that are null"
"""Content that is skipped and counted."""
WITH_NUL = "texts with a NUL character"
"""Content that is kept and counted: usually an accident, such as the tail of a file after a crash."""


@dataclass(frozen=True)
class Extent:
    """A part of one input file.

    Attributes:
        path: the file.
        format: one of `FORMATS`.
        start, stop: byte range of a txt or jsonl file (with the lines that start in it), or range of row groups of a
            parquet file; (0, size) for files that are read entirely, such as compressed ones.
        num_bytes: its share of the input size, for the progress display.
    """

    path: str
    format: str
    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True)
class TextOptions:
    """How documents are found in a file.

    Attributes:
        text_key: field of a record (json, jsonl) or column (parquet) with the text.
        whole_files: whether a txt file is one document, instead of one document a line.
        strip_lines: whether to strip white space from the lines of a txt file.
        raw_json: whether the JSON of a record is the document: a line of a jsonl file with its newline, or an element
            of a json file as `json.dumps` writes it.
    """

    text_key: str = "text"
    whole_files: bool = False
    strip_lines: bool = False
    raw_json: bool = False


def plan_shards(files: Iterable[tuple[Path, str]], options: TextOptions, shard_bytes: int) -> list[tuple[Extent, ...]]:
    """Partition files into shards of about `shard_bytes`, in input order: large files are split, small ones grouped."""
    shards: list[tuple[Extent, ...]] = []
    current: list[Extent] = []
    size = 0
    for path, format in files:
        for extent in _extents(path, format, options, shard_bytes):
            current.append(extent)
            size += extent.num_bytes
            if size >= shard_bytes:
                shards.append(tuple(current))
                current, size = [], 0
    if current:
        shards.append(tuple(current))
    return shards


def read_documents(extent: Extent, options: TextOptions, counts: Counter[str] | None = None) -> Iterator[str]:
    """Iterate over the texts of an extent, in order; empty ones are skipped.

    Args:
        extent: the part of a file to read.
        options: how documents are found.
        counts: incremented for skipped content and texts with NUL characters, by name.

    Raises:
        DataError: bytes that are not UTF-8, a line that is not JSON, or a record without the text.
    """
    counts = Counter() if counts is None else counts
    path = Path(extent.path)
    texts: Iterator[str | None]
    if extent.format == "parquet":
        texts = _read_parquet(path, extent, options.text_key)
    elif extent.format == "json":
        texts = _read_json(path, options)
    elif extent.format == "jsonl":
        texts = _read_jsonl(path, extent, options, counts)
    elif options.whole_files:
        texts = _read_whole(path)
    else:
        texts = _read_text_lines(path, extent, options, counts)
    for text in texts:
        if text is None:
            counts[NULL] += 1
        elif not text or text.isspace():
            counts[EMPTY] += 1
        else:
            if "\0" in text:
                counts[WITH_NUL] += 1
            yield text


def _extents(path: Path, format: str, options: TextOptions, shard_bytes: int) -> Iterator[Extent]:
    size = path.stat().st_size
    if format == "parquet":
        groups = open_parquet(path).metadata
        for group in range(groups.num_row_groups):
            share = size * groups.row_group(group).num_rows // max(1, groups.num_rows)
            yield Extent(str(path), format, group, group + 1, share)
    elif format == "json" or is_compressed(path) or (format == "txt" and options.whole_files):
        yield Extent(str(path), format, 0, size, size)
    else:
        for start in range(0, size, shard_bytes):
            stop = min(start + shard_bytes, size)
            yield Extent(str(path), format, start, stop, stop - start)


def read_lines(path: Path, extent: Extent) -> Iterator[tuple[int, bytes]]:
    """Iterate over (byte offset, line) of the lines that start in [start, stop), or of all of a compressed file."""
    stop = sys.maxsize if is_compressed(path) else extent.stop
    with open_input(path) as file:
        offset = 0
        if extent.start:
            file.seek(extent.start - 1)
            file.readline()
            offset = file.tell()
        while offset < stop and (line := file.readline()):
            yield offset, line
            offset += len(line)


def _read_whole(path: Path) -> Iterator[str]:
    with open_input(path) as file:
        yield decode_utf8(file.read(), path, 0)


def _read_text_lines(path: Path, extent: Extent, options: TextOptions, counts: Counter[str]) -> Iterator[str]:
    for offset, line in read_lines(path, extent):
        text = decode_utf8(line, path, offset)
        text = text.strip() if options.strip_lines else text.rstrip("\r\n")
        if text and not text.isspace():
            yield text
        else:
            counts[BLANK] += 1


def _read_jsonl(path: Path, extent: Extent, options: TextOptions, counts: Counter[str]) -> Iterator[str | None]:
    for offset, line in read_lines(path, extent):
        if line.isspace():
            counts[BLANK] += 1
            continue
        record = parse_line(line, path, offset)
        if options.raw_json:
            yield decode_utf8(line, path, offset)
        else:
            yield _text_of(record, options.text_key, f"{path}: the record at byte {offset}")


def _read_json(path: Path, options: TextOptions) -> Iterator[str | None]:
    for number, record in enumerate(iterate_json_array(path)):
        if options.raw_json:
            yield json.dumps(record)
        else:
            yield _text_of(record, options.text_key, f"{path}: record {number}")


def open_parquet(path: Path) -> Any:
    """Open a parquet file.

    Raises:
        DataError: it is damaged, or another kind of file.
    """
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises several kinds
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _read_parquet(path: Path, extent: Extent, text_key: str) -> Iterator[str | None]:
    file = open_parquet(path)
    names = file.schema_arrow.names
    if text_key not in names:
        raise DataError(
            f"{path}: no column '{text_key}'; its columns are {names}. "
            f"Choose one with --text-key.{nearest(text_key, names)}{_conversation_hint(names)}"
        )
    row = 0
    for batch in file.iter_batches(
        batch_size=PARQUET_ROWS, row_groups=list(range(extent.start, extent.stop)), columns=[text_key]
    ):
        for value in batch.column(0).to_pylist():
            yield _as_text(value, f"{path}: row {row} of row group {extent.start}", text_key)
            row += 1


def _text_of(record: Any, text_key: str, place: str) -> str | None:
    if isinstance(record, str):
        return check_unicode(record, place)
    if isinstance(record, dict) and text_key in record:
        return _as_text(record[text_key], place, text_key)
    if isinstance(record, list):
        raise DataError(f"{place} is an array, not a record; if the file is a single array, name it .json")
    keys = sorted(record) if isinstance(record, dict) else []
    found = f"its fields are {keys}" if keys else f"it is {type(record).__name__}"
    raise DataError(
        f"{place} has no text '{text_key}'; {found}. Choose a field with --text-key.{nearest(text_key, keys)}"
        f"{_conversation_hint(keys)}"
    )


def _conversation_hint(columns: list[str]) -> str:
    return " Or tokenize conversations: add --conversations" if fitting_forms(columns) else ""


def _as_text(value: Any, place: str, text_key: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{place}: '{text_key}' is {type(value).__name__}, not text; choose with --text-key")
    return check_unicode(value, f"{place}: '{text_key}'")


def check_unicode(text: str, place: str) -> str:
    """Return `text` if it is valid Unicode, which a JSON string need not be.

    Raises:
        DataError: it has a lone surrogate, which no tokenizer accepts; names the place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} has a lone surrogate (\\u{ord(text[error.start]):04x}) at character {error.start}, half of a "
            "character: correct or remove the record"
        ) from error
    return text
