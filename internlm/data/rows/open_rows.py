"""Opens files of rows in the format that their names tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from internlm.data.rows.arrow_rows import ArrowRows
from internlm.data.rows.parquet_rows import ParquetRows
from internlm.data.rows.row_file import RowFile
from internlm.data.rows.row_offsets import TextUnit
from internlm.data.rows.text_rows import JsonRows, TextRows
from internlm.data.tokenize.input_files import READ_COMPRESSIONS, is_compressed, is_tokenizer_record
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

_FORMATS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
}
ROW_SUFFIXES = ", ".join(f"*{suffix}" for suffix in _FORMATS)
READABLE = f"{ROW_SUFFIXES}, the text ones also with {READ_COMPRESSIONS}"

DEFAULT_UNIT: TextUnit = "line"

logger = get_logger(__name__)


def row_format(path: str | Path) -> str | None:
    """The format that a file name tells: parquet, arrow, jsonl, json or txt; None for another file."""
    path = Path(path)
    if is_tokenizer_record(path):
        return None
    if not is_compressed(path):
        return _FORMATS.get(path.suffix.lower())
    format = _FORMATS.get(path.with_suffix("").suffix.lower())
    return None if format in ("parquet", "arrow") else format


def open_rows(path: str | Path, columns: Sequence[str] | None = None, text_unit: TextUnit = DEFAULT_UNIT) -> RowFile:
    """Open a file of rows.

    Args:
        path: the file.
        columns: to read; None: all. A txt file has the column "text".
        text_unit: what is a row of a txt file.

    Raises:
        DataError: the file is missing, or its name tells no format.
    """
    format = row_format(path)
    if format == "parquet":
        return ParquetRows(path, columns)
    if format == "arrow":
        return ArrowRows(path, columns)
    if format in ("json", "jsonl"):
        return JsonRows(path, columns, is_array=format == "json")
    if format == "txt":
        return TextRows(path, text_unit)
    raise DataError(f"{path}: not a file of rows by its name; expected {READABLE}")


def open_row_files(
    paths: Iterable[str | Path], columns: Sequence[str] | None = None, text_unit: TextUnit | None = None
) -> list[RowFile]:
    """Open files of rows; see `open_rows`.

    Args:
        paths: the files.
        columns: to read; None: all.
        text_unit: what is a row of a txt file; None: a line, which is logged.

    Raises:
        DataError: a file is missing, or its name tells no format.
    """
    paths = list(paths)
    if text_unit is None and (texts := [path for path in paths if row_format(path) == "txt"]):
        logger.info(
            "%s%s: each line is a document (the default; a document can also be a paragraph or a whole file)",
            texts[0], f" and {len(texts) - 1:,} more txt files" if len(texts) > 1 else "",
        )  # fmt: skip
    return [open_rows(path, columns, text_unit or DEFAULT_UNIT) for path in paths]
