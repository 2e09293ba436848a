"""Tensors on disk: any box of any saved box is read exactly, and little else with it; sums tell every change."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.reads import CountReads
from hypothesis import given, settings
from hypothesis import strategies as st

import internlm.checkpoint.dcp_storage as dcp_storage
from internlm.checkpoint.boxed_tensor import BoxedTensor, BoxSavePlanner
from internlm.checkpoint.dcp_storage import StorageReader
from internlm.checkpoint.manifest import find_damage, read_manifest
from internlm.checkpoint.reading import load_tensors
from internlm.checkpoint.saving import SaveTask, complete, make_plan, write_part
from internlm.core.parallel.shard_spec import Box
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import StoragePath, storage_path

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float64, torch.bool]


def write(folder: StoragePath, tensors: dict[str, Any]) -> StoragePath:
    plan = make_plan(tensors)
    planner = BoxSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=True)
    folder.make_folder()
    task = SaveTask(1, final=folder / "1", writing=folder / ".writing-1")
    task.writing.make_folder()
    assert plan.metadata is not None
    complete(task, plan.metadata, [write_part(task, plan, planner)])
    return task.final


def boxed(shape: tuple[int, ...], dtype: torch.dtype, boxes: list[tuple[Box, torch.Tensor]]) -> BoxedTensor:
    return BoxedTensor(shape, dtype, boxes)


def whole(tensor: torch.Tensor) -> BoxedTensor:
    origin = (0,) * tensor.dim()
    shape = tuple(tensor.shape)
    return boxed(shape, tensor.dtype, [(Box(origin, origin, shape), tensor)])


@st.composite
def cases(draw: Any) -> tuple[torch.Tensor, list[int], tuple[int, ...], tuple[int, ...]]:
    """A tensor, where it is cut along its first dimension, and the offset and size of a box of it."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=4)))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 1000))
    tensor = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=torch.Generator().manual_seed(seed))
    cuts = draw(st.sets(st.integers(1, max(1, shape[0] - 1)))) if shape and shape[0] > 1 else set()
    offset = tuple(draw(st.integers(0, extent - 1)) for extent in shape)
    size = tuple(draw(st.integers(1, extent - start)) for extent, start in zip(shape, offset, strict=True))
    return tensor.to(dtype), sorted(cuts), offset, size


@settings(max_examples=150, deadline=None)
@given(case=cases(), run_bytes=st.sampled_from([1, 8, 1 << 30]), block_bytes=st.sampled_from([1, 16, 1 << 20]))
def test_any_box_is_read_exactly(tmp_path_factory: pytest.TempPathFactory, case: Any, run_bytes: int, block_bytes: int) -> None:  # fmt: skip # noqa: E501
    tensor, cuts, offset, size = case
    folder = storage_path(tmp_path_factory.mktemp("saved"))
    edges = [0, *cuts, tensor.shape[0]] if tensor.dim() else []
    rest = tuple(tensor.shape[1:])
    pieces = [
        (Box((start, *(0,) * len(rest)), (0,) * tensor.dim(), (stop - start, *rest)), tensor[start:stop])
        for start, stop in itertools.pairwise(edges)
    ]
    saved = boxed(tuple(tensor.shape), tensor.dtype, pieces) if tensor.dim() else whole(tensor)
    path = write(folder, {"t": saved})
    target = torch.zeros(size, dtype=tensor.dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp_storage, "RUN_BYTES", {True: run_bytes})
        patch.setattr(dcp_storage, "BLOCK_BYTES", block_bytes)
        wanted = boxed(tuple(tensor.shape), tensor.dtype, [(Box(offset, (0,) * len(size), size), target)])
        load_tensors(path, {"t": wanted}, no_dist=True)
    expected = tensor[tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))]
    assert torch.equal(target, expected)


def test_a_tensor_is_read_into_another_dtype_and_into_strided_places(tmp_path: Path) -> None:
    tensor = torch.randn(6, 8).to(torch.bfloat16)
    path = write(storage_path(tmp_path), {"t": whole(tensor)})
    target = torch.zeros(6, 16)
    load_tensors(
        path, {"t": boxed((6, 8), torch.float32, [(Box((0, 0), (0, 0), (6, 8)), target[:, ::2])])}, no_dist=True
    )
    assert torch.equal(target[:, ::2], tensor.float())
    assert (target[:, 1::2] == 0).all()


def test_views_of_large_tensors_take_no_more_room_than_their_elements(tmp_path: Path) -> None:
    large = torch.randn(1000, 1000)
    path = write(storage_path(tmp_path), {"t": whole(large[3:5]), "c": whole(large[:10, 7:9])})
    assert (path / "__0_0.distcp").size() < 2 * 4 * (2000 + 20)


def test_the_library_reads_the_files_with_its_own_reader(tmp_path: Path) -> None:
    tensor, column = torch.randn(5, 3), torch.randn(7, 4)[:, 1:3]
    path = write(storage_path(tmp_path), {"t": whole(tensor), "c": whole(column), "value": {"x": 1}})
    found: dict[str, Any] = {"t": torch.zeros(5, 3), "c": torch.zeros(7, 2), "value": None}
    dcp.load(found, storage_reader=dcp.FileSystemReader(path.local), no_dist=True)
    assert torch.equal(found["t"], tensor) and torch.equal(found["c"], column) and found["value"] == {"x": 1}


def test_only_the_rows_that_are_wanted_are_read(tmp_path: Path) -> None:
    tensor = torch.randn(1024, 2048)
    path = write(storage_path(tmp_path), {"t": whole(tensor)})
    rows = torch.zeros(128, 2048)
    with CountReads() as counted:
        load_tensors(
            path, {"t": boxed((1024, 2048), torch.float32, [(Box((256, 0), (0, 0), (128, 2048)), rows)])}, no_dist=True
        )
    assert torch.equal(rows, tensor[256:384])
    # Beside the rows, the list of tensors and the directory of the zip.
    assert rows.nbytes <= counted.num_bytes < rows.nbytes + 64 * 1024
    columns = torch.zeros(1024, 1024)
    part = Box((0, 1024), (0, 0), (1024, 1024))
    with CountReads() as counted:
        load_tensors(path, {"t": boxed((1024, 2048), torch.float32, [(part, columns)])}, no_dist=True)
    assert torch.equal(columns, tensor[:, 1024:])
    assert columns.nbytes <= counted.num_bytes < columns.nbytes + 64 * 1024


@pytest.mark.parametrize("position", [0, 100, -1])
def test_every_changed_byte_is_found(tmp_path: Path, position: int) -> None:
    path = write(storage_path(tmp_path), {"t": whole(torch.randn(50, 50))})
    manifest = read_manifest(path)
    assert manifest is not None and set(manifest.files) == {"__0_0.distcp", ".metadata"}
    assert find_damage(path, manifest) == []
    for name in manifest.files:
        content = bytearray((path / name).read_bytes())
        content[position] ^= 1
        (path / name).write_bytes(bytes(content))
        (line,) = find_damage(path, manifest)
        assert line.startswith(f"{name} has checksum ")
        content[position] ^= 1
        (path / name).write_bytes(bytes(content))
    (path / "__0_0.distcp").remove()
    assert find_damage(path, manifest) == ["__0_0.distcp is missing"]


def test_a_file_that_ends_too_soon_is_named(tmp_path: Path) -> None:
    path = write(storage_path(tmp_path), {"t": whole(torch.randn(50, 50))})
    content = (path / "__0_0.distcp").read_bytes()
    (path / "__0_0.distcp").write_bytes(content[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tensors(path, {"t": whole(torch.zeros(50, 50))}, no_dist=True)
    assert isinstance(StorageReader(path).folder, StoragePath)
