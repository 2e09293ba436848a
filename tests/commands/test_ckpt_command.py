"""`internlm ckpt`: what it lists, shows, compares and finds damaged."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from helpers.pages import ROOT
from helpers.runs import train
from helpers.tiny import tiny_config

from internlm.checkpoint.inspect import compare_tensors
from internlm.checkpoint.tensor_files import TensorReader, write_weights
from internlm.checkpoint.weight_source import LazyTensor
from internlm.cli import main
from internlm.config.schema import Config
from internlm.utils.storage import StoragePath, storage_path

TOKENS = "800"
"""Of ten steps of four samples of twenty tokens."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A save folder with checkpoints 5 and 10."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, 10)
    return folder


@pytest.fixture
def save_folder(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "save"))


def ckpt(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> list[str]:
    """The lines that the command prints."""
    assert main(["ckpt", *map(str, arguments)]) == code
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["ckpt", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def row(lines: list[str], first: str) -> list[str]:
    return next(line.split() for line in lines if line.split()[:1] == [first])


def to_store(folder: Path) -> StoragePath:
    """The same files in an object store (one in memory)."""
    store = storage_path(f"memory://{uuid.uuid4().hex}/save")
    for path in folder.rglob("*"):
        if path.is_file():
            target = store
            for part in path.relative_to(folder).parts:
                target = target / part
            target.write_bytes(path.read_bytes())
    return store


def weights(folder: Path, **values: torch.Tensor) -> StoragePath:
    """A checkpoint of these weights alone."""
    config = Config.model_validate(
        {"model": tiny_config().model_dump(), "data": {"seq_len": 8, "micro_bsz": 1, "total_steps": 1}}
    )
    lazy = {name: LazyTensor(tuple(value.shape), value.dtype, lambda v=value: v) for name, value in values.items()}  # type: ignore[misc]
    return write_weights(storage_path(folder), lazy, config=config)


# -- ls ----------------------------------------------------------------------------------------------------------------


def test_ls_shows_checkpoints_snapshots_exports_and_leftovers(
    save_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (save_folder / "snapshot").mkdir()
    shutil.copytree(save_folder / "5", save_folder / "snapshot" / "1")
    (save_folder / "7").mkdir()
    (save_folder / "7" / "__0_0.distcp").write_bytes(bytes(2048))
    (save_folder / ".writing-15-abc").mkdir()
    (save_folder / ".writing-15-abc" / "__0_0.distcp").write_bytes(bytes(3072))
    (save_folder / "10_hf").mkdir()
    (save_folder / "notes.txt").write_text("mine")
    lines = ckpt(capsys, "ls", save_folder)
    assert [line.split()[0] for line in lines[1:7]] == ["snapshot/1", "5", "7", "10", ".writing-15-abc", "10_hf"]
    assert row(lines, "5")[:4] == ["5", "5", "400", "checkpoint"]
    assert row(lines, "snapshot/1")[1] == "5" and row(lines, "snapshot/1")[3] == "snapshot"
    assert row(lines, "7")[3:7] == ["incomplete", "-", "2.00", "KiB"]
    assert "7: its manifest is missing: the save did not finish, or is in progress" in lines
    assert row(lines, ".writing-15-abc")[3] == "leftover"
    assert any(line.startswith("1 leftover(s), 3.00 KiB") for line in lines)
    assert not any("notes" in line for line in lines)


def test_ls_of_snapshots_and_of_a_checkpoint(save_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slots = save_folder.parent / "slots"
    shutil.copytree(save_folder / "10", slots / "0")
    assert row(ckpt(capsys, "ls", slots), "0")[1:4] == ["10", TOKENS, "snapshot"]
    assert row(ckpt(capsys, "ls", save_folder, "--snapshots", slots), f"{slots}/0")[1] == "10"
    assert len(ckpt(capsys, "ls", save_folder / "10")) == 2


def test_ls_says_what_is_damaged_and_what_is_internevos(save_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (save_folder / "5" / "5.step").write_text("{")
    (save_folder / "20").mkdir()
    torch.save({}, save_folder / "20" / "model_tp0_pp0.pt")
    torch.save({"step": 20}, save_folder / "20" / "20.step")
    lines = ckpt(capsys, "ls", save_folder)
    assert any(line.startswith("5: the manifest") and "damaged" in line for line in lines)
    assert row(lines, "20")[3] == "InternEvo"


def test_ls_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ckpt(capsys, "ls", tmp_path) == [f"no checkpoint in '{tmp_path}'"]
    assert f"'{tmp_path / 'gone'}' does not exist" in refused(capsys, "ls", tmp_path / "gone")


# -- show --------------------------------------------------------------------------------------------------------------


def test_show_sums_up_a_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ckpt(capsys, "show", trained)
    entries = TensorReader(storage_path(trained / "10")).entries
    shapes = [entry.shape for key, entry in entries.items() if key.startswith("model/")]
    count = sum(math.prod(shape) for shape in shapes)
    assert row(lines, "step") == ["step", "10"]
    assert row(lines, "samples") == ["samples", "40"]
    assert row(lines, "tokens") == ["tokens", TOKENS]
    assert row(lines, "parameters") == ["parameters", f"{count:,}"]
    assert row(lines, "contents")[1:] == ["model,", "optimizer,", "scheduler,", "sampler"]
    assert row(lines, "model")[1:3] == [str(len(shapes)), f"{count:,}"]
    sizes = sum(path.stat().st_size for path in (trained / "10").iterdir() if path.suffix != ".step")
    assert any(line.split()[0] == "files" and f"{sizes / 1024:,.2f} KiB" in line for line in lines if line)


def test_show_lists_tensors_on_request(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ckpt(capsys, "show", trained / "5", "--tensors", "layers.0.*.w2.weight")
    assert row(lines, "model/layers.0.feed_forward.w2.weight")[1:] == ["[32,", "56]", "float32", "7.00", "KiB"]
    assert not any("layers.1" in line for line in lines)
    everything = "\n".join(ckpt(capsys, "show", trained / "5", "--tensors"))
    assert all(key in everything for key in TensorReader(storage_path(trained / "5")).entries)
    assert "none of the" in refused(capsys, "show", trained / "5", "--tensors", "nothing")


def test_show_of_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = weights(tmp_path, one=torch.zeros(3, dtype=torch.bfloat16), two=torch.zeros(2, 2))
    lines = ckpt(capsys, "show", path)
    assert row(lines, "contents") == ["contents", "model"]
    assert row(lines, "model")[1:3] == ["2", "7"] and "bfloat16, float32" in "\n".join(lines)
    assert not any(line.startswith("tokens") for line in lines)


# -- diff --------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_equals_its_copy(trained: Path, save_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ckpt(capsys, "diff", trained, save_folder)[-1].startswith("equal: counters, configs and tensors")


def test_diff_names_counters_and_values(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ckpt(capsys, "diff", trained / "5", trained / "10", code=1)
    assert row(lines, "state.step") == ["state.step", "5", "10"]
    first, second = (TensorReader(storage_path(trained / step)).read("norm.weight") for step in ("5", "10"))
    gap = f"{float((first.double() - second.double()).abs().max()):.3g}"
    assert row(lines, "model/norm.weight") == ["model/norm.weight", gap, str(int((first != second).sum())), "32"]


def test_diff_without_values_and_of_weights_only(
    trained: Path, save_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ckpt(capsys, "diff", trained / "5", trained / "10", "--no-values", code=1)
    assert "values" not in lines and any(line.startswith("counters:") for line in lines)
    context = json.loads((save_folder / "10" / "context.json").read_text())
    context["world_size"] = 64
    (save_folder / "10" / "context.json").write_text(json.dumps(context))
    assert row(ckpt(capsys, "diff", trained, save_folder, code=1), "ranks") == ["ranks", "1", "64"]
    assert ckpt(capsys, "diff", trained, save_folder, "--weights-only")[-1].startswith("equal: weights, 17 tensors")


def test_diff_names_tensors_that_only_one_has_and_other_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = weights(tmp_path / "a", same=torch.ones(2), gone=torch.ones(1), shape=torch.ones(2, 3), kind=torch.ones(2))
    second = weights(
        tmp_path / "b", same=torch.ones(2), new=torch.ones(1), shape=torch.ones(3, 2), kind=torch.ones(2).bfloat16()
    )
    lines = ckpt(capsys, "diff", first, second, code=1)
    assert "tensors: 4 differ" in lines
    assert row(lines, "model/gone") == ["model/gone", "[1]", "float32", "absent"]
    assert row(lines, "model/new") == ["model/new", "absent", "[1]", "float32"]
    assert row(lines, "model/shape")[1:] == ["[2,", "3]", "float32", "[3,", "2]", "float32"]
    assert row(lines, "model/kind")[1:] == ["[2]", "float32", "[2]", "bfloat16"]
    assert "values" not in lines


def test_diff_names_keys_of_the_config(save_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, rate in ((trained, 1e-3), (save_folder, 2e-3)):
        text = json.dumps({"adam": {"lr": rate}, "model": {"vocab_size": 61}})
        copy = save_folder.parent / f"with_{rate}"
        shutil.copytree(folder / "5", copy / "5")
        (copy / "5" / "config.json").write_text(text)
    lines = ckpt(capsys, "diff", save_folder.parent / "with_0.001", save_folder.parent / "with_0.002", code=1)
    assert row(lines, "adam.lr") == ["adam.lr", "0.001", "0.002"] and "config: 1 differ" in lines


@pytest.mark.parametrize(
    ("one", "two", "gap", "count"),
    [
        ([1.0, 2.0], [1.0, 2.0], None, None),
        ([1.0, 2.0], [1.0, 2.5], 0.5, 1),
        ([math.nan, 2.0], [math.nan, 2.0], None, None),
        ([math.nan, 2.0], [1.0, 2.0], math.inf, 1),
        ([math.inf, 2.0], [math.inf, 2.0], None, None),
        ([math.inf, 2.0], [-math.inf, 2.0], math.inf, 1),
        ([0.0, 2.0], [-0.0, 2.0], 0.0, 1),
    ],
)
def test_elements_are_compared_bit_by_bit(
    one: list[float], two: list[float], gap: float | None, count: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internlm.checkpoint.inspect.COMPARED_AT_ONCE", 1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = compare_tensors("x", torch.tensor(one, dtype=dtype), torch.tensor(two, dtype=dtype))
        assert (
            (gap, count) == (None, None)
            if found is None
            else (found.max_difference, found.num_different) == (gap, count)
        )


def test_a_reader_of_the_output_may_leave(trained: Path) -> None:
    command = f"{sys.executable} -m internlm.cli ckpt diff {trained}/5 {trained}/10 | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.startswith("A ") and not done.stderr


# -- verify ------------------------------------------------------------------------------------------------------------


def test_verify_finds_nothing_in_what_was_written(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(ckpt(capsys, "verify", trained)) == 1
    lines = ckpt(capsys, "verify", trained, "--all")
    assert len(lines) == 2 and all(": good, " in line for line in lines)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "context.json"])
def test_verify_names_every_damaged_file(save_folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_folder / "5" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    lines = ckpt(capsys, "verify", save_folder / "5", code=1)
    assert "DAMAGED" in lines[0] and lines[1].startswith(f"  {name} has checksum ")
    path.write_bytes(content[:-1])
    assert f"  {name} has {len(content) - 1:,} bytes" in ckpt(capsys, "verify", save_folder / "5", code=1)[1]
    path.unlink()
    assert ckpt(capsys, "verify", save_folder, "--all", code=1)[1] == f"  {name} is missing"
    assert ": good" in ckpt(capsys, "verify", save_folder / "10")[0]


def test_verify_of_what_has_no_mark_or_a_damaged_one(save_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (save_folder / "5" / "5.step").unlink()
    assert "INCOMPLETE" in ckpt(capsys, "verify", save_folder / "5", code=1)[0]
    lines = ckpt(capsys, "verify", save_folder, "--all")
    assert "incomplete, not loadable" in lines[0] and ": good" in lines[1]
    (save_folder / "10" / "10.step").write_text('{"format": 1}')
    assert "DAMAGED" in ckpt(capsys, "verify", save_folder / "10", code=1)[0]


@pytest.mark.parametrize("action", ["show", "verify"])
def test_what_does_not_exist_is_a_mistake(tmp_path: Path, action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refused(capsys, action, tmp_path / "gone")
    assert "no complete checkpoint" in refused(capsys, action, tmp_path)


# -- stores ------------------------------------------------------------------------------------------------------------


def test_everything_works_in_an_object_store(save_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = to_store(save_folder)
    assert row(ckpt(capsys, "ls", store), "10")[1:4] == ["10", TOKENS, "checkpoint"]
    assert row(ckpt(capsys, "show", store), "step") == ["step", "10"]
    assert ckpt(capsys, "diff", store, save_folder)[-1].startswith("equal")
    assert len(ckpt(capsys, "verify", store, "--all")) == 2
    content = (store / "5" / "context.json").read_bytes()
    (store / "5" / "context.json").write_bytes(content[:-1])
    assert "context.json has" in ckpt(capsys, "verify", store / "5", code=1)[1]
    (store / "5" / "5.step").remove()
    assert row(ckpt(capsys, "ls", store), "5")[3] == "incomplete"
