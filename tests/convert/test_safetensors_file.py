"""Our safetensors files against the library's own, both ways, and damaged ones."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from internlm.checkpoint.weight_source import LazyTensor
from internlm.convert.safetensors_file import read_header, read_tensor, shard, write_safetensors
from internlm.utils.errors import CheckpointError

TENSORS = {
    "half": torch.randn(3, 5).bfloat16(),
    "single": torch.randn(7),
    "sixteen": torch.randn(2, 1, 2).half(),
    "counts": torch.arange(5),
    "nothing": torch.empty(0, 4),
    "ü": torch.tensor([True, False, True]),
    "turned": torch.randn(4, 6).t(),
}


def lazy(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}  # type: ignore[misc]


def written(tensors: dict[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    assert write_safetensors(stream, lazy(tensors)) == stream.tell()
    return stream.getvalue()


def read_all(data: bytes) -> dict[str, Tensor]:
    stream = io.BytesIO(data)
    return {n: read_tensor(stream, place, "file") for n, place in read_header(stream, len(data), "file").items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    assert_equal(load(written(TENSORS)), TENSORS)
    (tmp_path / "file").write_bytes(written(TENSORS))
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read() -> None:
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    assert_equal(read_all(save(tensors, {"format": "pt"})), tensors)
    assert_equal(read_all(written(TENSORS)), TENSORS)


def test_every_tensor_is_aligned_to_its_elements() -> None:
    data = written({"odd": torch.zeros(3, dtype=torch.uint8), **TENSORS})
    places = read_header(io.BytesIO(data), len(data), "file")
    assert all(place.offset % place.dtype.itemsize == 0 for place in places.values())


def test_one_tensor_at_a_time_is_held() -> None:
    """Each is asked for after the one before was written, and not kept."""
    alive: list[int] = []

    class Counted:
        def __init__(self, number: int) -> None:
            self.number = number

        def __call__(self) -> Tensor:
            # `alive` has the bytes that were written when this one was asked for.
            alive.append(stream.tell())
            return torch.full((1000,), float(self.number))

    stream = io.BytesIO()
    write_safetensors(stream, {str(n): LazyTensor((1000,), torch.float32, Counted(n)) for n in range(4)})
    assert [after - before for before, after in pairwise(alive)] == [4000] * 3


WHOLE = written({"a": torch.arange(8.0), "b": torch.arange(6).bfloat16()})


@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_that_is_cut_off_anywhere_is_refused(length: int) -> None:
    with pytest.raises(CheckpointError, match="file"):
        read_all(WHOLE[:length])


@given(st.integers(0, len(WHOLE)), st.binary(max_size=40))
def test_garbage_anywhere_gives_tensors_or_an_error_of_ours(place: int, garbage: bytes) -> None:
    damaged = WHOLE[:place] + garbage + WHOLE[place + len(garbage) :]
    try:
        assert len(read_all(damaged)) <= 2
    except CheckpointError as error:
        assert "file" in str(error)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}, "dtype F4"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "'a' has 4 bytes for shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "truncated"),
        ({"a": {"dtype": "F32"}}, "header is damaged"),
    ],
)
def test_headers_that_cannot_be(header: dict[str, object], message: str) -> None:
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + b"1234"
    with pytest.raises(CheckpointError, match=message):
        read_all(data)


def test_shards_keep_the_order_and_the_size() -> None:
    assert shard({"a": 4, "b": 4, "c": 9, "d": 1, "e": 1}, 8) == [["a", "b"], ["c"], ["d", "e"]]
    assert shard({"a": 4}, 8) == [["a"]]
