"""A run whose context ranks share samples shows the numbers of one process: losses, evaluation, tokens per second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import metrics_of, start_ranks, start_training, write_config

from internlm.data.tokenized_files.writer import TokenizedWriter


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 40 tokens, in train/text and valid."""
    folder, random = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for name, number in (("train/text/a", 60), ("valid/b", 7)):
        (folder / name).parent.mkdir(parents=True)
        with TokenizedWriter(folder / f"{name}.bin") as writer:
            for length in random.integers(1, 41, number):
                writer.write(random.integers(0, 61, length))
    return folder


def train(folder: Path, corpus: Path, world_size: int, **changes: Any) -> list[dict[str, Any]]:
    data = {
        "train_folder": str(corpus / "train"), "valid_folder": str(corpus / "valid"), "valid_every": 2,
        "valid_by_position": True, "total_steps": 4,
    }  # fmt: skip
    lines = [f"data.update({data!r})", "model.update(dtype='torch.float64', num_nextn_predict_layers=1)"]
    config = write_config(folder, "\n".join([*lines, *(f"{name} = {value!r}" for name, value in changes.items())]))
    arguments = ["--config", config, "--run-dir", folder / "run"]
    alone = world_size == 1
    processes = [start_training(arguments, folder / "out")] if alone else start_ranks(arguments, folder, world_size)
    assert [process.wait() for process in processes] == [0] * world_size, processes[0].output
    return metrics_of(folder / "run")


# 32 tokens of a micro-batch, which 3 ranks do not divide.
@pytest.mark.parametrize("size", [2, 3])
def test_a_run_on_context_ranks_shows_the_numbers_of_one_process(size: int, corpus: Path, tmp_path: Path) -> None:
    one = train(tmp_path / "one", corpus, 1)
    shared = train(tmp_path / "shared", corpus, size, parallel={"context": {"size": size, "cut": "zigzag"}})
    names = {name for line in one for name in line}
    shown = {name for name in names if name.startswith(("loss", "acc", "grad_norm", "val/", "tokens/", "multi_token/"))}
    assert {"val/valid_loss", "val/valid_loss_by_position/0", "multi_token/loss/1", "loss/text"} <= shown
    assert len(shared) == len(one)
    for ours, theirs in zip(shared, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in shown & ours.keys():
            # Sums of losses in another order, in float64; shown in fp32.
            assert ours[name] == pytest.approx(theirs[name], rel=2**-22), name
        if "tgs" in ours:
            # Tokens of the step are counted once, and divided by all ranks.
            assert ours["tgs"] * size * ours["total_time"] == pytest.approx(ours["num_tokens"])
            assert ours["num_tokens"] == theirs["num_tokens"] == 64
