"""Mapping .npy files without the parser of Python source; `np.load` is the oracle."""

from __future__ import annotations

import ast
import gc
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from internlm.utils.errors import DataError
from internlm.utils.npy_files import map_npy

FIX = "copy it again"


def assert_as_loaded(path: Path) -> None:
    found, expected = map_npy(path, FIX), np.load(path, mmap_mode="r")
    assert (found.dtype, found.shape, found.flags.c_contiguous, found.flags.f_contiguous, found.flags.writeable) == (
        expected.dtype,
        expected.shape,
        expected.flags.c_contiguous,
        expected.flags.f_contiguous,
        False,
    )
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (0, 4), (2, 0), (2, 3, 4), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_shape_and_order_is_that_of_numpy(shape: tuple[int, ...], order: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.asarray(np.random.default_rng(0).integers(0, 100, shape), order=order))
    assert_as_loaded(path)


DTYPES = ["<i8", "<i4", ">i4", "<u2", ">u2", "u1", "i1", "?", "<f2", "<f4", ">f8", "<c16", "S5", "U3", "V2"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)], ids=str)
def test_every_dtype_and_version_is_that_of_numpy(dtype: str, version: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    values = np.random.default_rng(0).integers(0, 256, 12 * np.dtype(dtype).itemsize, dtype=np.uint8)
    array: NDArray[Any] = (values % 2 if dtype in ("?", "U3") else values).view(dtype).reshape(3, 4)
    if dtype == "U3":
        array = np.array([["ab", "c", ""]])
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version)
    assert_as_loaded(path)


def write_header(path: Path, header: str, content: bytes = bytes(8 * 6)) -> None:
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', 'fortran_order': False, 'shape': (6,), }   \n",
        "{'shape': (2, 3), 'fortran_order': True, 'descr': '<i8'}",
        "{'fortran_order':False,'descr':'<i8','shape':(2,3,),}",
        "{ 'descr' : '<i8' , 'fortran_order' : False , 'shape' : (5,) }",
    ],
)
def test_headers_of_other_writers_are_read(header: str, tmp_path: Path) -> None:
    write_header(tmp_path / "a.npy", header)
    assert_as_loaded(tmp_path / "a.npy")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (6,), }",
        "{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (6,), }",
        "{'descr': '<i3', 'fortran_order': False, 'shape': (6,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (6), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-6,), }",
        "{'descr': '<i8', 'fortran_order': 0, 'shape': (6,), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': 6, }",
        "{'descr': '<i8', 'fortran_order': False}",
        "{'descr': '<i8', 'descr': '<i8', 'shape': (6,)}",
        "{'descr': '<i8' 'fortran_order': False, 'shape': (6,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (6,), 'more': 1}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (6,), } + 1",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (6,)",
        "junk",
    ],
)
def test_other_headers_are_refused_by_file(header: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_header(path, header)
    with pytest.raises(DataError, match=r"a\.npy is not a \.npy array of numbers or strings.*; copy it again$"):
        map_npy(path, FIX)


@pytest.mark.parametrize("kept", [0, 5, 7, 9, 10, 40, 127, 128, 160, 167])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(5))
    assert path.stat().st_size == 168
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=rf"a\.npy is not a (complete )?\.npy array: .*; {FIX}$"):
        map_npy(path, FIX)


def test_how_much_of_a_truncated_file_is_missing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_header(path, "{'descr': '<i8', 'fortran_order': False, 'shape': (1000, 3)}", b"")
    size = path.stat().st_size
    with pytest.raises(DataError, match=rf"int64 of shape \(1000, 3\) needs {24000 + size:,} bytes, and it has {size}"):
        map_npy(path, FIX)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(b"not an array")
    with pytest.raises(DataError, match=r"a\.npy is not a \.npy array: it begins with b'not an a'; copy it again$"):
        map_npy(path, FIX)
    path.write_bytes(b"\x93NUMPY\x04\x00" + bytes(200))
    with pytest.raises(DataError, match=r"a\.npy is not a \.npy array: it begins with"):
        map_npy(path, FIX)
    with path.open("wb") as file:
        np.savez(file, np.arange(3))
    with pytest.raises(DataError, match=r"a\.npy is an archive of arrays \(\.npz\)"):
        map_npy(path, FIX)
    with pytest.raises(FileNotFoundError, match=r"b\.npy"):
        map_npy(tmp_path / "b.npy", FIX)


@contextmanager
def parsing_collector() -> Iterator[None]:
    """Garbage is collected after every allocation, and each collection parses Python source."""

    def parse(phase: str, info: dict[str, int]) -> None:
        ast.parse("f(1, [2, (3, 4)])")

    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(parse)
    gc.set_threshold(1)
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)
        gc.callbacks.remove(parse)


def test_threads_map_files_while_others_parse(tmp_path: Path) -> None:
    """With `np.load`, Python 3.11 raises a SystemError here."""
    path = tmp_path / "a.npy"
    np.save(path, np.arange(12).reshape(3, 4))
    with parsing_collector(), ThreadPoolExecutor(8) as threads:
        sums = list(threads.map(lambda _: int(map_npy(path, FIX).sum()), range(100)))
    assert sums == [66] * 100


def test_only_this_function_reads_npy_files() -> None:
    package = Path(map_npy.__code__.co_filename).parents[1]
    sources = (path for path in package.rglob("*.py") if path.name != "npy_files.py")
    assert not [path for path in sources if "np.load(" in path.read_text(encoding="utf-8")]
