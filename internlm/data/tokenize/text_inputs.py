"""Documents out of txt, json, jsonl and parquet files, in bounded memory and from any byte range of them.

Owns formats, UTF-8 and the cutting of inputs into shards of about equal size. Knows no tokenizer.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm.utils.errors import DataError, nearest

FORMATS = ("txt", "json", "jsonl", "parquet")
_JSON_BLOCK = 1 << 20
_PARQUET_ROWS = 256


@dataclass(frozen=True)
class Extent:
    """A part of one input file.

    Attributes:
        start, stop: bytes of a txt or jsonl file (lines that begin in the range belong to it), row groups of a parquet
            file; (0, size) where a file is read as a whole.
        num_bytes: its share of the size of the input, for progress.
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
        text_key: the field of a record (json, jsonl) or the column (parquet) that holds the text.
        whole_files: a txt file is one document, not one a line.
    """

    text_key: str = "text"
    whole_files: bool = False


def find_inputs(paths: Iterable[str | Path], format: str | None = None) -> list[tuple[Path, str]]:
    """The input files with their formats; folders are searched recursively, in sorted order.

    Args:
        format: of files whose suffix does not say it; files in a folder are taken by suffix alone.
    Raises:
        DataError: a path is missing, or no file of a known format is found.
    """
    found: list[tuple[Path, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            walk = os.walk(path, followlinks=True)
            everything = sorted(Path(folder, name) for folder, _, names in walk for name in names)
            inside = [(file, file.suffix[1:]) for file in everything if file.suffix[1:] in FORMATS]
            if not inside:
                raise DataError(f"{path}: no file named *.{', *.'.join(FORMATS)} in this folder")
            found += inside
        elif path.is_file():
            kind = path.suffix[1:] if path.suffix[1:] in FORMATS else format
            if kind is None:
                raise DataError(f"{path}: the suffix says no format; give one with --format {'|'.join(FORMATS)}")
            found.append((path, kind))
        else:
            raise DataError(f"{path}: no such file or folder")
    return found


def plan_shards(files: Iterable[tuple[Path, str]], options: TextOptions, shard_bytes: int) -> list[tuple[Extent, ...]]:
    """Cut files into shards of about `shard_bytes`, in input order: large files are split, small ones joined."""
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


def read_documents(extent: Extent, options: TextOptions) -> Iterator[str]:
    """The texts of an extent, in order; empty ones are left out.

    Raises:
        DataError: bytes that are not UTF-8, a line that is not JSON, or a record without the text.
    """
    path = Path(extent.path)
    if extent.format == "parquet":
        texts = _read_parquet(path, extent, options.text_key)
    elif extent.format == "json":
        texts = _read_json(path, options.text_key)
    elif extent.format == "jsonl":
        texts = _read_jsonl(path, extent, options.text_key)
    elif options.whole_files:
        texts = iter([_decode(path.read_bytes(), path, 0)])
    else:
        texts = (_decode(line, path, offset).rstrip("\r\n") for offset, line in _lines(path, extent))
    return (text for text in texts if text and not text.isspace())


def _extents(path: Path, format: str, options: TextOptions, shard_bytes: int) -> Iterator[Extent]:
    size = path.stat().st_size
    if format == "parquet":
        groups = _parquet_file(path).metadata
        for group in range(groups.num_row_groups):
            share = size * groups.row_group(group).num_rows // max(1, groups.num_rows)
            yield Extent(str(path), format, group, group + 1, share)
    elif format == "json" or (format == "txt" and options.whole_files):
        yield Extent(str(path), format, 0, size, size)
    else:
        for start in range(0, size, shard_bytes):
            stop = min(start + shard_bytes, size)
            yield Extent(str(path), format, start, stop, stop - start)


def _lines(path: Path, extent: Extent) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of the lines that begin in [start, stop)."""
    with open(path, "rb") as file:
        if extent.start:
            file.seek(extent.start - 1)
            file.readline()
        offset = file.tell()
        while offset < extent.stop and (line := file.readline()):
            yield offset, line
            offset += len(line)


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset + error.start, error.reason) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _not_utf8(path: Path, offset: int, reason: str) -> DataError:
    return DataError(
        f"{path}: byte {offset} is not UTF-8 ({reason}). Convert the file first, for example: iconv -f latin1 -t utf-8"
    )


def _first_bad_byte(path: Path) -> int:
    """The offset of the first byte that is not UTF-8, of a file that has one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open(path, "rb") as file:
        while block := file.read(_JSON_BLOCK):
            kept = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return offset - kept + error.start
            offset += len(block)
    return offset - len(decoder.getstate()[0])


def iterate_json_lines(path: Path) -> Iterator[Any]:
    """The values of a JSON lines file.

    Raises:
        DataError: not UTF-8, or not JSON; names the file and the byte.
    """
    whole = Extent(str(path), "jsonl", 0, path.stat().st_size, 0)
    return (value for _, value in _json_lines(path, whole))


def _json_lines(path: Path, extent: Extent) -> Iterator[tuple[int, Any]]:
    for offset, line in _lines(path, extent):
        if line.isspace():
            continue
        try:
            yield offset, json.loads(_decode(line, path, offset))
        except ValueError as error:
            raise DataError(f"{path}: the line at byte {offset} is not JSON: {error}") from error


def _read_jsonl(path: Path, extent: Extent, text_key: str) -> Iterator[str]:
    for offset, record in _json_lines(path, extent):
        yield _text_of(record, text_key, f"{path}: the record at byte {offset}")


def _read_json(path: Path, text_key: str) -> Iterator[str]:
    for number, record in enumerate(iterate_json_array(path)):
        yield _text_of(record, text_key, f"{path}: record {number}")


def iterate_json_array(path: Path) -> Iterator[Any]:
    """The elements of a JSON array one by one, without loading the file; a single object counts as one element.

    Raises:
        DataError: not UTF-8, or not JSON; names the file and the place.
    """
    decoder = json.JSONDecoder()
    buffer, consumed = "", 0
    inside = started = False
    with open(path, encoding="utf-8-sig") as file:
        while True:
            try:
                block = file.read(_JSON_BLOCK)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, _first_bad_byte(path), error.reason) from error
            buffer += block
            position = 0
            while True:
                while position < len(buffer) and buffer[position] in ", \t\r\n":
                    position += 1
                if position == len(buffer):
                    break
                if buffer[position] == "[" and not started:
                    inside = started = True
                    position += 1
                    continue
                if buffer[position] == "]" and inside:
                    return
                try:
                    record, end = decoder.raw_decode(buffer, position)
                except json.JSONDecodeError as error:
                    unfinished = error.pos > len(buffer) - 16 or error.msg.startswith("Unterminated string")
                    if block and unfinished:
                        break  # the element may go on in the next block
                    raise DataError(f"{path}: not JSON at character {consumed + error.pos}: {error.msg}") from error
                started = True
                yield record
                position = end
            buffer, consumed = buffer[position:], consumed + position
            if not block:
                if inside:
                    raise DataError(f"{path}: truncated: the array ends without ']' at character {consumed}")
                return


def _parquet_file(path: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # pyarrow raises several kinds
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def _read_parquet(path: Path, extent: Extent, text_key: str) -> Iterator[str]:
    file = _parquet_file(path)
    names = file.schema_arrow.names
    if text_key not in names:
        raise DataError(
            f"{path}: no column '{text_key}', only {names}; choose with --text-key.{nearest(text_key, names)}"
        )
    row = 0
    for batch in file.iter_batches(
        batch_size=_PARQUET_ROWS, row_groups=list(range(extent.start, extent.stop)), columns=[text_key]
    ):
        for value in batch.column(0).to_pylist():
            yield _as_text(value, f"{path}: row {row} of row group {extent.start}", text_key)
            row += 1


def _text_of(record: Any, text_key: str, place: str) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, dict) and text_key in record:
        return _as_text(record[text_key], place, text_key)
    keys = sorted(record) if isinstance(record, dict) else []
    found = f"its fields are {keys}" if keys else f"it is {type(record).__name__}"
    raise DataError(f"{place} has no text '{text_key}', {found}; choose with --text-key.{nearest(text_key, keys)}")


def _as_text(value: Any, place: str, text_key: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: '{text_key}' is {type(value).__name__}, not text; choose with --text-key")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: '{text_key}' has a lone surrogate at character {error.start}: not Unicode"
        ) from error
    return value
