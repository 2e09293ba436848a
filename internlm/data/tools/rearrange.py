"""Splits and shuffles files of documents, one document in memory at a time."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from internlm.data.documents.document_file import DocumentFile
from internlm.data.permutation import permute
from internlm.data.tools.input_documents import Document, Inputs, read_document
from internlm.data.tools.output_documents import OutputFormat, Written, check_free, remove_output, write_documents
from internlm.utils.errors import DataError

_BLOCK = 1 << 16
_MAX_OPEN_FILES = 128


def shuffled(inputs: Inputs, seed: int) -> Iterator[Document]:
    """All documents in an order that is a pure function of the files and the seed.

    Raises:
        DataError: a document is malformed.
    """
    lengths = [len(inputs.open(path)) for path in inputs.paths]
    ends = np.cumsum(lengths)
    opened: OrderedDict[int, DocumentFile] = OrderedDict()
    total = int(ends[-1])
    for start in range(0, total, _BLOCK):
        for position in permute(np.arange(start, min(start + _BLOCK, total)), total, seed).tolist():
            number = int(np.searchsorted(ends, position, side="right"))
            if number not in opened:
                opened[number] = inputs.open(inputs.paths[number])
                if len(opened) > _MAX_OPEN_FILES:
                    opened.popitem(last=False)
            opened.move_to_end(number)
            yield read_document(opened[number], position - (int(ends[number]) - lengths[number]))


def split(inputs: Inputs, path: Path, parts: int, output: OutputFormat) -> list[Written]:
    """Write the documents, in order, to files NAME-00000-of-00004.bin of nearly equal numbers of tokens.

    Args:
        inputs: files with random access.
        path: NAME.bin, of which the names are made.
        parts: number of files.
        output: their format.

    Raises:
        DataError: a file exists already, there are fewer documents than files, or a document does not fit the format.
            No file is left.
    """
    files = [inputs.open(each) for each in inputs.paths]
    counts = [file.counts() for file in files]
    total, num_documents = sum(int(each.sum()) for each in counts), sum(map(len, counts))
    if num_documents < parts:
        raise DataError(f"{path}: {num_documents:,} documents cannot be split into {parts:,} files")
    names = [path.with_name(f"{path.stem}-{part:05d}-of-{parts:05d}{path.suffix}") for part in range(parts)]
    for name in names:
        check_free(name)
    ends = np.cumsum(np.concatenate(counts))
    cuts = np.searchsorted(ends, [total * part / parts for part in range(1, parts)]) + 1
    # At least one document for each file, also if one document has most of the tokens.
    for part in range(parts - 1):
        lowest = (int(cuts[part - 1]) if part else 0) + 1
        cuts[part] = min(max(int(cuts[part]), lowest), num_documents - (parts - 1 - part))
    sizes = np.diff([0, *cuts.tolist(), num_documents])
    documents, written = inputs.documents(), list[Written]()
    try:
        for name, size in zip(names, sizes, strict=True):
            written.append(write_documents(name, itertools.islice(documents, int(size)), output))
    except BaseException:
        # The command can be repeated once its cause is removed.
        for each in written:
            remove_output(each.path)
        raise
    return written
