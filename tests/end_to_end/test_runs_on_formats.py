"""Runs on Megatron datasets and token arrays: each packing, types, validation, resuming, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import metrics_of, slurm_environments, start_training, write_config
from helpers.data_folders import write_file

PACKINGS = {
    "cut": {},
    "pack_sample_into_one": {"pack_sample_into_one": True},
    "unpacked": {"use_packed_dataset": False},
}


def write_documents(path: Path, format: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    content = [random.integers(1, 60, random.integers(2, 40)).tolist() for _ in range(60)]
    write_file(path, "ds" if format == "arrays" else format, content)


def train(folder: Path, data: dict[str, Any], *arguments: object, run: str = "run") -> tuple[int, str, list[Any]]:
    """Exit code, output and the lines of the metrics of steps."""
    config = write_config(folder, f"data.update({data!r})\n")
    command = start_training(["--config", config, "--run-dir", folder / run, *arguments], folder / f"{run}.txt")
    code = command.wait()
    lines = [] if code or "--dry-run" in arguments else metrics_of(folder / run)
    return code, command.output, lines


def losses(lines: list[Any]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def keys_of(format: str, folder: Path) -> dict[str, Any]:
    keys: dict[str, Any] = {"type": format, "train_folder": str(folder / "train"), "min_length": 4}
    return keys | ({"array_dtype": "uint16"} if format == "arrays" else {})


@pytest.mark.parametrize("packing", PACKINGS)
def test_formats_of_the_same_documents_train_alike(packing: str, tmp_path: Path) -> None:
    found = {}
    for format in ("tokenized", "megatron", "arrays"):
        folder = tmp_path / format
        for seed, name in enumerate(("cn", "en")):
            write_documents(folder / "train" / name / "a", format, seed)
            write_documents(folder / "valid" / name / "b", format, seed + 2)
        keys = keys_of(format, folder) | PACKINGS[packing]
        keys |= {"total_steps": 4, "valid_folder": str(folder / "valid"), "valid_every": 2, "num_worker": 0}
        code, output, lines = train(folder, keys)
        assert code == 0, output
        found[format] = [
            {name: value for name, value in line.items() if name.startswith(("loss", "tokens/", "val", "grad_norm"))}
            for line in lines
        ]
        assert len(losses(lines)) == 4 and {"tokens/cn", "tokens/en"} <= lines[0].keys()
    assert any(name.startswith("val") and "en" in name for line in found["megatron"] for name in line)
    assert found["tokenized"] == found["megatron"] == found["arrays"]


@pytest.mark.parametrize("format", ["megatron", "arrays"])
def test_a_resumed_run_is_the_same_run(format: str, tmp_path: Path) -> None:
    write_documents(tmp_path / "train" / "a", format, 0)
    keys = keys_of(format, tmp_path)
    code, output, straight = train(tmp_path, keys | {"total_steps": 8}, "--set", "ckpt.enable_save_ckpt=False")
    assert code == 0, output
    code, output, first = train(tmp_path, keys | {"total_steps": 5}, run="first")
    assert code == 0, output
    code, output, second = train(tmp_path, keys | {"total_steps": 8}, run="second")
    assert code == 0 and "resuming at step 5" in output, output
    assert losses(first) + losses(second) == losses(straight)


@pytest.mark.parametrize("format", ["megatron", "arrays"])
def test_a_dry_run_reads_the_data(format: str, tmp_path: Path) -> None:
    write_documents(tmp_path / "train" / "a", format, 0)
    code, output, _ = train(tmp_path, keys_of(format, tmp_path), "--dry-run")
    assert code == 0 and "the config is valid" in output, output
    file = next((tmp_path / "train").glob("a.bin" if format == "megatron" else "a.ds"))
    file.write_bytes(file.read_bytes()[:-2])
    code, output, _ = train(tmp_path, keys_of(format, tmp_path), "--dry-run")
    assert code == 2 and str(file) in output, output


def test_internevo_and_nanogpt_name_files(tmp_path: Path) -> None:
    """InternEvo's train_folder is Megatron's prefix of one dataset; nanoGPT has train.bin and val.bin in one folder."""
    write_documents(tmp_path / "corpus_text_document", "megatron", 0)
    keys = {"type": "megatron", "train_folder": str(tmp_path / "corpus_text_document"), "data_impl": "infer"}
    code, output, lines = train(tmp_path, keys | {"total_steps": 2}, run="prefix")
    assert code == 0 and len(losses(lines)) == 2, output
    (tmp_path / "nano").mkdir()
    for name in ("train.bin", "val.bin"):
        np.random.default_rng(0).integers(1, 60, 2000).astype("<u2").tofile(tmp_path / "nano" / name)
    keys = {"type": "arrays", "array_dtype": "uint16", "train_folder": str(tmp_path / "nano" / "train.bin")}
    keys |= {"valid_folder": str(tmp_path / "nano" / "val.bin"), "valid_every": 2, "total_steps": 2}
    code, output, lines = train(tmp_path / "nano_run", keys)
    assert code == 0 and len(losses(lines)) == 2, output


def test_megatrons_list_of_weights_is_refused(tmp_path: Path) -> None:
    keys = {"type": "megatron", "train_folder": "0.3 /data/a_text_document 0.7 /data/b_text_document"}
    code, output, _ = train(tmp_path, keys)
    assert code == 2 and "not Megatron's list of weights and prefixes" in output, output


@pytest.mark.parametrize("difference", ["another file", "a missing type", "no folder", "another validation set"])
def test_ranks_with_other_data_are_named(difference: str, tmp_path: Path) -> None:
    commands = []
    for rank, environment in enumerate(slurm_environments(2)):
        root = tmp_path / f"machine{rank}"
        for number, name in enumerate(("web/a", "web/b", "code/c")):
            write_documents(root / "train" / name, "tokenized", number)
        write_documents(root / "valid" / "held" / "a", "tokenized", 9)
        if rank == 1 and difference == "another file":
            write_documents(root / "train" / "web" / "b", "tokenized", 7)
        elif rank == 1 and difference == "a missing type":
            shutil.rmtree(root / "train" / "code")
        elif rank == 1 and difference == "no folder":
            shutil.rmtree(root / "train")
        elif rank == 1:
            write_documents(root / "valid" / "held" / "a", "tokenized", 8)
        data = {"train_folder": str(root / "train"), "valid_folder": str(root / "valid"), "valid_every": 2}
        config = write_config(root, f"data.update({data!r})\n")
        output = tmp_path / f"rank{rank}.txt"
        commands.append(start_training(["--config", config, "--run-dir", tmp_path / "run"], output, environment))
    codes = [command.wait() for command in commands]
    assert codes == ([1, 2] if difference == "no folder" else [2, 2])
    for command in commands:
        expected = {"no folder": "no such folder", "another validation set": "tokens of 'held' is"}
        assert expected.get(difference, "ranks have found different data") in command.output, command.output
        assert "Traceback" not in command.output
