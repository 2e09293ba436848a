"""Inputs of `internlm data` that need care: dtypes that differ, masks of parquet files, loops, repeated files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from internlm.cli import main
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.tokenized_files.writer import TokenizedWriter


def data(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What the command prints."""
    assert main(["data", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    return printed.err if code == 2 else printed.out


def megatron(path: Path, documents: list[list[int]], dtype: str) -> Path:
    with MegatronWriter(path, np.dtype(dtype)) as writer:
        for document in documents:
            writer.write(document)
    return path


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("order", list(itertools.permutations(("a", "b", "c"))))
def test_the_output_has_a_dtype_for_the_ids_of_all_inputs(
    order: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = {"a": [[1, 2], [3]], "b": [[70_000, 4], [5]], "c": [[6]]}
    for name, dtype in (("a", "uint16"), ("b", "int32"), ("c", "uint8")):
        megatron(tmp_path / "in" / f"{name}.bin", documents[name], dtype)
    output = tmp_path / "out.bin"
    data(capsys, "merge", *(tmp_path / "in" / name for name in order), "--output", output)
    expected = [document for name in order for document in documents[name]]
    assert np.fromfile(output, np.int32).tolist() == [token for document in expected for token in document]
    for action in (("shuffle",), ("split", "--parts", 2)):
        name = tmp_path / action[0] / "o.bin"
        data(capsys, action[0], tmp_path / "in", "--output", name, *action[1:])
        found = np.concatenate([np.fromfile(path, np.int32) for path in sorted(name.parent.glob("*.bin"))])
        assert sorted(found.tolist()) == [1, 2, 3, 4, 5, 6, 70_000]


@pytest.mark.parametrize(("to", "name"), [("megatron", "o.bin"), ("arrays", "o.ds")])
def test_a_split_that_fails_leaves_nothing(
    to: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = megatron(tmp_path / "a.bin", [[1, 2], [3, 4], [70_000]], "int32")
    output = tmp_path / "parts" / name
    options = ("--parts", 3, "--output", output, "--to", to)
    message = data(capsys, "split", source, *options, "--dtype", "uint16", code=2)
    assert "ids that uint16 cannot hold; give a larger --dtype" in message
    assert list(output.parent.iterdir()) == []
    assert data(capsys, "split", source, *options).count("1 documents") == 3


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"labels": [[-100, -100, 7, 8]]}, '{"tokens": [-5,-6,7,8]}'),
        ({"labels": [[-100, 6, 7, -100]], "attention_mask": [[1, 1, 1, 1]]}, '{"tokens": [-5,6,7,-8]}'),
        ({"assistant_masks": [[0, 1, 0, 1]]}, '{"tokens": [-5,6,-7,8]}'),
        ({"completion_mask": [[0, 1, 1, 1]], "assistant_masks": [[1, 1, 0, 1]]}, '{"tokens": [-5,6,-7,8]}'),
        ({"loss_mask": [[False, True, True, True]]}, '{"tokens": [-5,6,7,8]}'),
        ({"loss_mask": [[0, 1, 1, 1]]}, '{"tokens": [-5,6,7,8]}'),
        ({"loss_mask": pyarrow.array([None], pyarrow.list_(pyarrow.bool_()))}, '{"tokens": [5,6,7,8]}'),
        ({"attention_mask": [[0, 1, 1, 0]]}, '{"tokens": [6,7]}'),
        ({"attention_mask": [[1, 1, 1, 0]], "labels": [[-100, 6, 7, -100]]}, '{"tokens": [-5,6,7]}'),
    ],
)
def test_every_mask_of_a_parquet_file_counts(
    columns: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = parquet(tmp_path / "a.parquet", input_ids=[[5, 6, 7, 8]], **columns)
    output = tmp_path / "b.bin"
    data(capsys, "convert", source, "--to", "tokenized", "--output", output)
    assert lines_of(output) == [line]
    if "-" in line:
        options = ("--to", "megatron", "--output", tmp_path / "c.bin")
        assert "document 0 has tokens without loss" in data(capsys, "convert", source, *options, code=2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"labels": [[6, 7, 8, -100]]}, "row 0: the labels are neither the ids nor -100"),
        ({"labels": [[-100, 6]]}, "row 0 has 4 ids, but a labels of 2"),
        ({"loss_mask": [[True, None, True, True]]}, "row 0, loss_mask is not a list of integers"),
        ({"loss_mask": [[0.2, 0.0, 1.0, 1.0]]}, "row 0, loss_mask is not a list of integers"),
        ({"loss_mask": [[0, 2, 1, 1]]}, "row 0: loss_mask has values other than 0 and 1"),
        ({"input_ids": [[5, -6, 7]]}, "row 0: token -6 is below 0; mark tokens without loss in a column loss_mask"),
        ({"input_ids": [[True, False]]}, "row 0 is not a list of integers"),
    ],
)
def test_marks_that_have_no_meaning_are_refused(
    columns: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = parquet(tmp_path / "a.parquet", **{"input_ids": [[5, 6, 7, 8]], **columns})
    for to in ("tokenized", "megatron"):
        options = ("--to", to, "--output", tmp_path / "b.bin")
        assert message in data(capsys, "convert", source, *options, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet"]


def test_an_id_that_no_tokenizer_has_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = pyarrow.array([[1, 2], [3_000_000_000]], pyarrow.list_(pyarrow.uint32()))
    source = parquet(tmp_path / "a.parquet", input_ids=ids)
    options = ("--to", "parquet", "--output", tmp_path / "b.parquet")
    message = data(capsys, "convert", source, *options, code=2)
    assert "document 1 has the id 3,000,000,000, which int32 cannot hold" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet"]


def test_a_link_to_a_folder_above_it_is_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train" / "en" / "a.bin"
    path.parent.mkdir(parents=True)
    with TokenizedWriter(path) as writer:
        writer.write([1, 2, 3])
    (path.parent / "again").symlink_to(tmp_path / "train")
    (path.parent / "shared").mkdir()
    other = tmp_path / "elsewhere"
    other.mkdir()
    with TokenizedWriter(other / "b.bin") as writer:
        writer.write([4, 5])
    (path.parent / "shared" / "linked").symlink_to(other)
    printed = data(capsys, "inspect", tmp_path / "train")
    assert printed.splitlines()[2].split() == ["en", "2", "2", "5", "100.0%", "2.5", "3"]


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    megatron(tmp_path / "train" / "en" / "a.bin", [[1], [2]], "uint16")
    train, options = tmp_path / "train", ("--output", tmp_path / "out.bin")
    for second in (train / "en", train / "en" / "a.bin", train / "en" / "a", train / "en" / ".." / "en"):
        message = data(capsys, "merge", train, second, *options, code=2)
        assert "a.bin is named more than once, and its documents would be repeated" in message
    assert not (tmp_path / "out.bin").exists()


def test_a_dataset_of_another_format_does_not_stand_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = megatron(tmp_path / "a.bin", [[1, 2], [3]], "uint16")
    index = (tmp_path / "a.idx").read_bytes()
    for to, name in (("arrays", "a.ds"), ("parquet", "a.parquet")):
        data(capsys, "convert", source, "--to", to, "--output", tmp_path / name)
    assert np.fromfile(tmp_path / "a.ds", np.uint16).tolist() == [1, 2, 3]
    assert (tmp_path / "a.idx").read_bytes() == index
    (tmp_path / "b.idx").touch()
    options = ("--to", "tokenized", "--output", tmp_path / "b.bin")
    assert "b.idx: exists already" in data(capsys, "convert", source, *options, code=2)
