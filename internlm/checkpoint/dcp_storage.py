"""Tensors of a checkpoint in any storage, in the file format of torch.distributed.checkpoint.

The library plans; this module writes and reads the files in any `StoragePath`, one tensor at a time, and computes a
checksum of every file. A rank reads only the rows that it needs.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, cast

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from internlm.utils.storage import StoragePath

BLOCK_BYTES = 64 * 2**20
"""Bytes of a tensor per read."""

METADATA_FILE = ".metadata"
"""The library's name of the file that lists all tensors."""

CHECKSUM_BLOCK_BYTES = 4 * 2**20
"""Bytes per read when the checksum of a file is computed."""

RUN_BYTES = {True: 4096, False: 2**20}
"""Whether the file is local -> size in bytes from which a part of a row is read without the rest of the row."""


@dataclass(frozen=True)
class FileChecksum:
    """Size and checksum (128 bits of XXH3, https://github.com/Cyan4973/xxHash, in hex) of a file."""

    size: int
    xxh3: str


class ChecksumFile(io.RawIOBase):
    """Writes through to a file and computes its checksum on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = xxhash.xxh3_128()
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._hash.update(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def tell(self) -> int:
        return self._size

    @property
    def checksum(self) -> FileChecksum:
        """Size and checksum of everything written so far."""
        return FileChecksum(self._size, self._hash.hexdigest())


def file_checksum(path: StoragePath) -> FileChecksum:
    """The checksum of a file, which is read block by block."""
    total, size = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(CHECKSUM_BLOCK_BYTES))
    with path.open_read() as file:
        while count := cast(Any, file).readinto(block):
            total.update(block[:count])
            size += count
    return FileChecksum(size, total.hexdigest())


class Resolver(Protocol):
    """Provides the data of write items, as the library's save planners do."""

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor of an item of a plan, or the bytes of its value."""


def write_tensors(path: StoragePath, plan: SavePlan, resolver: Resolver) -> tuple[list[WriteResult], FileChecksum]:
    """Write all items of a plan into one file, one at a time; the library's own writer copies all tensors first.

    Raises:
        StorageError: the storage cannot be written.
    """
    results = []
    with path.open_write() as file, _without_zip_checksums():
        hashed = ChecksumFile(file)
        for item in plan.items:
            offset = hashed.tell()
            data = resolver.resolve_data(item)
            if isinstance(data, Tensor):
                torch.save(_with_own_storage(data), cast(Any, hashed))
            else:
                hashed.write(data.getbuffer())
            info = _StorageInfo(path.name, offset, hashed.tell() - offset)
            results.append(WriteResult(item.index, info.length, info))
    return results, hashed.checksum


def _with_own_storage(tensor: Tensor) -> Tensor:
    """The tensor on the CPU in a storage of its own, because torch.save writes the whole storage."""
    # Normalizes the strides of dimensions of size 1, which are written too, so that equal tensors give equal files.
    tensor = tensor.detach().cpu().contiguous().view(-1).view(tensor.shape)
    if tensor.numel() == tensor.untyped_storage().nbytes() // tensor.dtype.itemsize or tensor.numel() == 0:
        return tensor.clone() if tensor.numel() == 0 else tensor
    elements = tensor.reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(elements, dtype=tensor.dtype).view(tensor.shape)


@contextmanager
def _without_zip_checksums() -> Iterator[None]:
    """Disable the zip format's CRC32, as the whole file has a checksum."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class StorageReader(FileSystemReader):
    """Reads boxes of tensors from the files in a folder; from each file, only the rows that contain them."""

    def __init__(self, folder: StoragePath) -> None:
        # The base class knows local paths only, and none of its file methods is used.
        super().__init__("unused")
        self.folder = folder
        self._tensors: dict[str, Any] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return pickle.loads((self.folder / METADATA_FILE).read_bytes())

    def set_up_storage_reader(self, metadata: Any, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._tensors = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in sorted(by_file.items()):
            items.sort(key=lambda item: (self.storage_data[item.storage_index].offset, tuple(item.storage_offsets)))
            starts: dict[MetadataIndex, int] = {}
            with (self.folder / name).open_read() as buffered:
                # Unbuffered on a local disk, where short reads are cheap and a buffer would read ahead.
                file = cast(BinaryIO, cast(io.BufferedReader, buffered).raw) if self.folder.is_local else buffered
                for item in items:
                    info = self.storage_data[item.storage_index]
                    if item.type == LoadItemType.BYTE_IO:
                        data = bytearray(info.length)
                        _fill(file, info.offset, memoryview(data))
                        planner.load_bytes(item, io.BytesIO(data))
                    else:
                        target = planner.resolve_tensor(item).detach()
                        if item.storage_index not in starts:
                            starts[item.storage_index] = _start_of_data(file, info)
                        self._read_tensor(file, item, target, starts[item.storage_index])
                        planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_tensor(self, file: BinaryIO, item: ReadItem, target: Tensor, start: int) -> None:
        saved = self._tensors[item.storage_index.fqn]
        assert isinstance(saved, TensorStorageMetadata)
        box = _SavedBox(self._saved_shape(saved, item.storage_index), saved.properties.dtype, start)
        run_bytes = RUN_BYTES[self.folder.is_local]
        box.read_into(file, target, tuple(item.storage_offsets), tuple(item.lengths), run_bytes)

    def _saved_shape(self, saved: TensorStorageMetadata, index: MetadataIndex) -> tuple[int, ...]:
        if index.index is not None and saved.chunks[index.index].offsets == index.offset:
            return tuple(saved.chunks[index.index].sizes)
        return tuple(next(chunk.sizes for chunk in saved.chunks if chunk.offsets == index.offset))


def _start_of_data(file: BinaryIO, info: Any) -> int:
    """File offset of the elements of a saved tensor, which torch.save stores uncompressed in a zip archive."""
    section: Any = _Section(file, info.offset, info.length)
    archive: Any = torch._C.PyTorchFileReader(section)
    return info.offset + archive.get_record_offset("data/0")


class _Section(io.RawIOBase):
    """A section of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._position)]
        self._file.seek(self._offset + self._position)
        count = cast(Any, self._file).readinto(view)
        self._position += count
        return count


@dataclass(frozen=True)
class _SavedBox:
    """A saved box: its elements in a file, row-major from byte `start` on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    def read_into(
        self, file: BinaryIO, target: Tensor, offset: tuple[int, ...], size: tuple[int, ...], run_bytes: int
    ) -> None:
        """Fill `target` (of shape `size`) with the part of this box that begins at `offset`."""
        if target.numel() == 0:
            return
        # A row is an index of the first dimension; a scalar has one row.
        row_shape, part_shape, part_offset = self.shape[1:], size[1:], offset[1:]
        rows = target if target.dim() else target.reshape(1)
        first, count = (offset[0], size[0]) if size else (0, 1)
        row_bytes = math.prod(row_shape) * self.dtype.itemsize
        if part_shape == row_shape:
            for start, stop in _blocks(count, row_bytes):
                self._read(file, self.start + (first + start) * row_bytes, rows[start:stop])
            return
        run = math.prod(part_shape[1:]) * self.dtype.itemsize * part_shape[0]
        if part_shape[1:] == row_shape[1:] and run >= run_bytes:
            skip = part_offset[0] * math.prod(row_shape[1:]) * self.dtype.itemsize
            for row in range(count):
                self._read(file, self.start + (first + row) * row_bytes + skip, rows[row])
            return
        part = tuple(slice(start, start + length) for start, length in zip(part_offset, part_shape, strict=True))
        for start, stop in _blocks(count, row_bytes):
            block = torch.empty(stop - start, *row_shape, dtype=self.dtype)
            self._read(file, self.start + (first + start) * row_bytes, block)
            rows[start:stop].copy_(block[(slice(None), *part)])

    def _read(self, file: BinaryIO, position: int, target: Tensor) -> None:
        """Fill a tensor with consecutive elements of the file."""
        is_direct = target.is_contiguous() and target.dtype == self.dtype and target.device.type == "cpu"
        read = target if is_direct else torch.empty(target.shape, dtype=self.dtype)
        view = memoryview(cast(Any, read.reshape(-1).view(torch.uint8).numpy()))
        _fill(file, position, view)
        if not is_direct:
            target.copy_(read)


def _fill(file: BinaryIO, position: int, view: memoryview) -> None:
    """Read `len(view)` bytes."""
    file.seek(position)
    done = 0
    while done < len(view):
        count = cast(Any, file).readinto(view[done:])
        if not count:
            raise EOFError(f"the file is truncated: {len(view) - done} bytes are missing")
        done += count


def _blocks(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, num_rows, rows):
        yield start, min(num_rows, start + rows)
