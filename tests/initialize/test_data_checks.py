"""Data that a run would fail on later is found before its first step, and by `--dry-run`."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import metrics_of, start_training, write_config
from helpers.runs import steps_in

from internlm.data.tokenized_files.writer import TokenizedWriter


def write(path: Path, *documents: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with TokenizedWriter(path) as writer:
        for document in documents:
            writer.write(document)


@pytest.mark.parametrize(
    "document, cause",
    [([3, 61, 4], "token 61 at position 1 is outside the vocabulary of 61"), ([-3, -4], "no token contributes loss")],
)
def test_a_valid_set_that_cannot_be_evaluated(tmp_path: Path, document: list[int], cause: str) -> None:
    write(tmp_path / "valid" / "good" / "a.bin", [1, 2, 3])
    write(tmp_path / "valid" / "bad" / "a.bin", document)
    write(tmp_path / "train" / "a.bin", *[[5] * 40] * 20)
    config = write_config(
        tmp_path, f"data.update(train_folder='{tmp_path}/train', valid_folder='{tmp_path}/valid', valid_every=100)"
    )
    arguments = ["--config", config, "--run-dir", tmp_path / "run"]
    for more in (["--dry-run"], []):
        command = start_training([*arguments, *more], tmp_path / "out.txt")
        assert command.wait() == 2, command.output
        assert cause in command.output and f"{tmp_path}/valid/bad" in command.output
        assert "Traceback" not in command.output
    assert metrics_of(tmp_path / "run") == [] and steps_in(tmp_path / "checkpoints") == []
    write(tmp_path / "valid" / "bad" / "a.bin", [3, 4])
    command = start_training([*arguments, "--dry-run"], tmp_path / "out.txt")
    assert command.wait() == 0, command.output
    for line in (
        f"train folder '{tmp_path}/train': 20 documents, 800 tokens, all read",
        "validation set 'bad': 1 documents, 2 tokens, all read",
        "the config is valid",
    ):
        assert line in command.output.splitlines()


def test_train_data_of_another_vocabulary(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.bin", *[[5] * 40] * 20, [5, 61])
    config = write_config(tmp_path, f"data['train_folder'] = '{tmp_path}/train'")
    command = start_training(["--config", config, "--dry-run"], tmp_path / "out.txt")
    assert command.wait() == 2, command.output
    assert "document 20 at byte" in command.output and "outside the vocabulary of 61" in command.output
