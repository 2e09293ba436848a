"""Writes documents to a file of any format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internlm.data.megatron_files.reader import index_path
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.token_arrays.reader import ends_path
from internlm.data.token_arrays.writer import ArrayWriter
from internlm.data.tokenized_files.tokenizer_record import TokenizerRecord, record_path, write_record
from internlm.data.tokenized_files.writer import TokenizedWriter, encode_line, meta_path
from internlm.data.tools.input_documents import PARQUET, Document
from internlm.data.tools.parquet_documents import ParquetWriter
from internlm.utils.errors import DataError

DTYPES = ("uint16", "int32", "uint32", "int64")


@dataclass(frozen=True)
class OutputFormat:
    """How documents are written.

    Attributes:
        name: one of `INPUT_FORMATS`.
        dtype: of the ids of megatron and arrays.
        separator: see `ArrayWriter`.
        drop_mask: write tokens without loss to formats that cannot mark them, where they then contribute loss; False
            refuses them.
        record: of the tokenizer that made the documents, written beside the file; None: not known.
    """

    name: str
    dtype: str = "int32"
    separator: int | None = None
    drop_mask: bool = False
    record: TokenizerRecord | None = None


@dataclass
class Written:
    """What was written to a file."""

    path: Path
    documents: int = 0
    tokens: int = 0


def check_free(path: Path) -> None:
    """Check that no file that belongs to the output `path` exists.

    Raises:
        DataError: one does.
    """
    for each in _files_of(path):
        if each.exists():
            raise DataError(f"{each}: exists already; remove it or choose another name")


def remove_output(path: Path) -> None:
    """Remove a written output with all files that belong to it."""
    for each in _files_of(path):
        each.unlink(missing_ok=True)


def write_documents(path: Path, documents: Iterable[Document], output: OutputFormat) -> Written:
    """Write documents to `path`, which appears when they are complete.

    Raises:
        DataError: a file exists already, or a document does not fit the format.
    """
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = Written(path)
    with ExitStack() as stack:
        write = _open(path, output, stack)
        for document in documents:
            if output.name in ("megatron", "arrays") and not output.drop_mask and not document.loss_mask.all():
                raise DataError(
                    f"{path}: document {written.documents} has tokens without loss, which '{output.name}' files cannot "
                    "mark. With --drop-mask these tokens contribute loss like all others"
                )
            write(document)
            written.documents += 1
            written.tokens += len(document.ids)
    if output.record is not None:
        write_record(path, output.record)
    return written


def _files_of(path: Path) -> tuple[Path, ...]:
    """The output `path` and all files that may belong to it, by its suffix."""
    beside = {
        ".bin": (meta_path(path), index_path(path)),
        ".ds": (ends_path(path), path.with_name(path.name + ".metadata")),
    }
    return path, *beside.get(path.suffix, ()), record_path(path)


def _open(path: Path, output: OutputFormat, stack: ExitStack) -> Callable[[Document], Any]:
    """Open the writer; it is closed with `stack`."""
    if output.name == "tokenized":
        tokenized = stack.enter_context(TokenizedWriter(path))
        return lambda document: tokenized.write_line(_line(document), len(document.ids))
    if output.name == "megatron":
        megatron = stack.enter_context(MegatronWriter(path, np.dtype(output.dtype)))
        return lambda document: megatron.write(document.ids, document.sequence_lengths)
    if output.name == PARQUET:
        parquet = stack.enter_context(ParquetWriter(path))
        return lambda document: parquet.write(document.ids, document.loss_mask)
    arrays = stack.enter_context(ArrayWriter(path, np.dtype(output.dtype), output.separator))
    return lambda document: arrays.write(document.ids)


def _line(document: Document) -> bytes:
    signed = np.where(document.loss_mask, document.ids, -document.ids)
    return encode_line(signed.tolist(), np.flatnonzero((document.ids == 0) & ~document.loss_mask).tolist())
