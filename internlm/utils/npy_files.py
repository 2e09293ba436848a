"""Maps `.npy` files into memory from any thread.

`np.load` parses the header of a file with `ast.literal_eval`, which fails in Python 3.11 with "AST constructor
recursion depth mismatch" if another thread, or a callback of the garbage collector, parses at the same time
(https://github.com/python/cpython/issues/106905). The format is described in `numpy.lib.format`.
"""

from __future__ import annotations

import math
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from internlm.utils.errors import DataError

_ARCHIVE_MAGIC = b"PK\x03\x04"
_HEADER_LENGTHS = {(1, 0): "<H", (2, 0): "<I", (3, 0): "<I"}
"""Version of the format -> how the length of its header is stored."""
_LONGEST_HEADER = 10_000
_HEADER = re.compile(
    r"""
    \{\s*
    (?:
        (?:
            'descr'\s*:\s*'(?P<dtype>[<>|][?biufcSUV]\d{1,9})'
            | 'fortran_order'\s*:\s*(?P<fortran_order>True|False)
            | 'shape'\s*:\s*\((?P<shape>\d{1,18}\s*,|\d{1,18}(?:\s*,\s*\d{1,18})+\s*,?|)\)
        )
        \s*(?:,\s*|(?=\}))
    ){3}
    \}\s*
    """,
    re.VERBOSE | re.ASCII,
)


class _UnreadableError(Exception):
    """What is wrong with a file."""


def map_npy(path: Path, fix: str) -> NDArray[Any]:
    """Map the array of a `.npy` file into memory, read-only.

    Args:
        path: the file. Its dtype is of integers, floats, complex numbers, booleans, strings or bytes, without fields.
        fix: what to do about a file that cannot be mapped; the end of the error's message.

    Returns:
        The array, of the shape, dtype and order that `np.load(path, mmap_mode="r")` has.

    Raises:
        DataError: the file is truncated, is no `.npy` file, or has another dtype.
        OSError: it does not exist or cannot be opened.
    """
    with path.open("rb") as file:
        try:
            return _map(file)
        except _UnreadableError as error:
            raise DataError(f"{path} is {error}; {fix}") from error
        except OSError as error:
            raise DataError(f"{path} cannot be mapped into memory ({error}); {fix}") from error


def _map(file: BinaryIO) -> NDArray[Any]:
    shape, dtype, order = _read_header(file)
    offset = file.tell()
    expected, found = offset + math.prod(shape) * dtype.itemsize, os.fstat(file.fileno()).st_size
    if found < expected:
        raise _UnreadableError(
            f"not a complete .npy array: {dtype} of shape {shape} needs {expected:,} bytes, and it has {found:,}"
        )
    return np.memmap(file, dtype, "r", offset, shape, order)


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any], Any]:
    """Shape, dtype, and order ("C" or "F"); the file is then at its first element."""
    magic = file.read(np.lib.format.MAGIC_LEN)
    if magic.startswith(_ARCHIVE_MAGIC):
        raise _UnreadableError("an archive of arrays (.npz), not a .npy array")
    prefix, version = magic[:-2], tuple(magic[-2:])
    if len(magic) < np.lib.format.MAGIC_LEN or prefix != np.lib.format.MAGIC_PREFIX or version not in _HEADER_LENGTHS:
        raise _UnreadableError(f"not a .npy array: it begins with {magic!r}")
    stored = _HEADER_LENGTHS[version]
    length = file.read(struct.calcsize(stored))
    size = struct.unpack(stored, length)[0] if len(length) == struct.calcsize(stored) else 0
    # A damaged length must not make this read gigabytes.
    header = file.read(min(size, _LONGEST_HEADER)).decode("latin1")
    if not size or len(header) < size:
        raise _UnreadableError(f"not a complete .npy array: its header ends after {len(header):,} of {size:,} bytes")
    match = _HEADER.fullmatch(header)
    if match is None or None in match.groups():
        raise _UnreadableError(f"not a .npy array of numbers or strings: its header is {header.strip()[:200]!r}")
    try:
        dtype = np.dtype(match["dtype"])
    except TypeError as error:
        raise _UnreadableError(f"not a .npy array of numbers or strings: its dtype is {match['dtype']!r}") from error
    shape = tuple(int(size) for size in match["shape"].split(",") if size.strip())
    return shape, dtype, "F" if match["fortran_order"] == "True" else "C"
