"""Reads and writes the safetensors format tensor by tensor, on any stream, including those of an object store.

The format (https://github.com/huggingface/safetensors): the length of the header (8 bytes, little-endian); the header
(JSON: name -> dtype, shape and offsets); the bytes of the tensors. The header depends on shapes and dtypes only, so a
file is written with one tensor in memory at a time. The library itself writes all tensors at once, and memory-maps the
files it reads, whose pages count as resident memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from internlm.checkpoint.weight_source import LazyTensor
from internlm.utils.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_MAX_HEADER = 100_000_000
"""The library's own limit in bytes; a longer header means a damaged file."""


@dataclass(frozen=True)
class TensorLocation:
    """A tensor in a file: dtype, shape, and the offset of its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(stream: BinaryIO, tensors: Mapping[str, LazyTensor]) -> int:
    """Write a file, one tensor at a time.

    Args:
        stream: written sequentially.
        tensors: in the order in which to read them, except that wider dtypes come first, so that all are aligned.

    Returns:
        Bytes written.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)
    for name, tensor in ordered:
        _write_tensor(stream, name, tensor)
    return 8 + len(text) + offset


def _write_tensor(stream: BinaryIO, name: str, tensor: LazyTensor) -> None:
    """Write one tensor. A separate function, so that the tensor is freed before the next one is read."""
    values = tensor.read()
    assert (tuple(values.shape), values.dtype) == (tuple(tensor.shape), tensor.dtype), name
    stream.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)


def read_header(stream: BinaryIO, size: int, where: str) -> dict[str, TensorLocation]:
    """Read the location of each tensor in a file.

    Args:
        stream: at the file's first byte.
        size: bytes of the file.
        where: the file, for messages.

    Raises:
        CheckpointError: the file is not a safetensors file, is truncated, or has an unsupported dtype.
    """
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise CheckpointError(f"{where}: not a safetensors file, or truncated: {size} bytes, header of {length}")
    try:
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        locations = {}
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(f"{where}: '{name}' has dtype {entry['dtype']}, which is not supported")
            begin, end = entry["data_offsets"]
            location = TensorLocation(_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + begin)
            if begin < 0 or end - begin != location.num_bytes:
                raise ValueError(f"'{name}' has {end - begin} bytes for shape {list(location.shape)}")
            if 8 + length + end > size:
                raise CheckpointError(f"{where}: truncated: it has {size} bytes, '{name}' ends at {8 + length + end}")
            locations[name] = location
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: the safetensors header is damaged: {error}") from error
    return locations


def read_tensor(stream: BinaryIO, location: TensorLocation, where: str) -> Tensor:
    """Read a tensor into new memory.

    Raises:
        CheckpointError: the file ends before the tensor does.
    """
    buffer = torch.empty(location.num_bytes, dtype=torch.uint8)
    view = buffer.numpy().data
    stream.seek(location.offset)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{where}: truncated: {len(view) - done} bytes are missing")
        done += count
    return buffer.view(location.dtype).view(location.shape)


def shard(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Group names, in order, into files of at most `max_bytes`; a larger tensor gets its own file."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
