"""Runs on recorded batches (`data.type = "mocked"`), and configs with XTuner's names of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import metrics_of, start_training, write_config

from internlm.config.loader import load_config
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import ConfigError


def train(folder: Path, data: dict[str, Any], *arguments: object, run: str = "run") -> tuple[int, str, list[float]]:
    """Exit code, output and losses."""
    config = write_config(folder, f"data.update({data!r})\n")
    process = start_training(["--config", config, "--run-dir", folder / run, *arguments], folder / f"{run}.txt")
    code = process.wait()
    return code, process.output, [line["loss"] for line in metrics_of(folder / run) if "loss" in line]


def test_a_recording_trains_as_the_documents_that_it_was_made_of(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(1, 60, (4 * 6, 17))
    for step in range(6):
        part = torch.from_numpy(rows[4 * step : 4 * step + 4])
        torch.save(part[:2, :-1].clone(), tmp_path / f"tokens_step{step + 1}_dp0.pt")
        torch.save(part[2:, :-1].clone(), tmp_path / f"tokens_step{step + 1}_dp1.pt")
        torch.save(part[:2, 1:].clone(), tmp_path / f"labels_step{step + 1}_dp0.pt")
        torch.save(part[2:, 1:].clone(), tmp_path / f"labels_step{step + 1}_dp1.pt")
    keys = {"type": "mocked", "train_folder": str(tmp_path), "total_steps": 6, "pack_sample_into_one": True}
    code, output, straight = train(tmp_path, keys, "--set", "ckpt.enable_save_ckpt=False")
    assert code == 0 and len(straight) == 6, output
    # Other micro-batches and packing, interrupted once.
    other = keys | {"micro_bsz": 1, "micro_num": 4, "pack_sample_into_one": False, "use_packed_dataset": False}
    code, output, first = train(tmp_path, other | {"total_steps": 3}, run="first")
    assert code == 0, output
    code, output, second = train(tmp_path, other, run="second")
    assert code == 0 and "resuming at step 3" in output, output
    assert first + second == pytest.approx(straight, rel=1e-5)
    code, output, _ = train(tmp_path, keys | {"total_steps": 7}, "--dry-run", run="dry")
    assert code == 2 and "data.total_steps = 7, but " in output and "has 6 recorded steps" in output, output
    torch.save(torch.zeros(2, 16), tmp_path / "tokens_step5_dp1.pt")
    code, output, _ = train(tmp_path, keys, "--dry-run", run="junk")
    assert code == 2 and "tokens_step5_dp1.pt: torch.float32 [2, 16]; expected integers" in output, output
    refused = keys | {"rampup_batch_size": "1 1 2", "valid_folder": str(tmp_path), "valid_every": 1, "min_length": 3}
    code, output, _ = train(tmp_path, refused, "--dry-run", run="refused")
    for name in ("rampup_batch_size = '1 1 2'", "min_length = 3"):
        assert code == 2 and f"data.{name}, but data.type = 'mocked' replays recorded batches" in output, output
    assert "data.type = 'mocked' has no validation files" in output


def test_xtuners_names_point_at_an_internlm_folder(tmp_path: Path) -> None:
    with TokenizedWriter(tmp_path / "data" / "en" / "a.bin") as writer:
        for number in range(40):
            writer.write(np.arange(1, 40) % (number + 2))
    ours = {"train_folder": str(tmp_path / "data"), "total_steps": 3}
    code, output, expected = train(tmp_path / "ours", ours)
    assert code == 0, output
    text = f"data.pop('seq_len')\ndata.update(dataset_folder={str(tmp_path / 'data')!r}, max_length=16, total_steps=3, "
    config = write_config(tmp_path / "theirs", f"{text}pack_to_max_length=True)\n")
    command = ["--config", config, "--run-dir", tmp_path / "theirs" / "run"]
    process = start_training(command, tmp_path / "theirs" / "run.txt")
    assert process.wait() == 0, process.output
    assert [line["loss"] for line in metrics_of(tmp_path / "theirs" / "run")] == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("dataset_folder='a', train_folder='b'", "data.dataset_folder = 'a' contradicts data.train_folder = 'b'"),
        ("max_length=32", "data.max_length = 32 contradicts data.seq_len = 16"),
        ("pack_to_max_length=True, packing='unpacked'", "'unpacked' contradicts data.pack_to_max_length = True"),
        ("pack_to_max_length=False, packing='cut'", "'cut' contradicts data.pack_to_max_length = False"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, keys: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(tmp_path, f"data.update({keys})\n"))
    assert message in str(caught.value)


@pytest.mark.parametrize(("value", "packing"), [(True, "cut"), (False, "unpacked")])
def test_pack_to_max_length_chooses_the_packing(tmp_path: Path, value: bool, packing: str) -> None:
    more = f"data.pop('seq_len')\ndata.update(max_length=64, pack_to_max_length={value})\n"
    data = load_config(write_config(tmp_path, more)).config.data
    assert (data.seq_len, data.packing) == (64, packing)
    more = "data.update(packing='best_fit', pack_to_max_length=True)\n"
    assert load_config(write_config(tmp_path, more)).config.data.packing == "best_fit"
