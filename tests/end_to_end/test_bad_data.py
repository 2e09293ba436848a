"""Documents that cannot be read in mid-run: they stop the run, or are skipped up to a limit over all ranks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import metrics_of, start_ranks, start_training, write_config

from internlm.data.tokenized_files.writer import TokenizedWriter

BAD = {7, 20, 33, 46, 59}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 16 tokens, of which five have an id outside the vocabulary of 61: one epoch is 15 steps."""
    root = tmp_path_factory.mktemp("bad")
    random = np.random.default_rng(0)
    with TokenizedWriter(root / "a.bin") as writer:
        for number in range(60):
            ids = random.integers(1, 60, 16)
            ids[3] = 99 if number in BAD else ids[3]
            writer.write(ids)
    return root


def config_of(place: Path, folder: Path, **keys: Any) -> Path:
    data = {"train_folder": str(folder), "packing": "unpacked", "micro_bsz": 1, "micro_num": 4, "total_steps": 15}
    return write_config(place, f"data.update({data | keys!r})\nckpt.update(checkpoint_every=4)\n")


def train(place: Path, config: Path, run: str = "run", *arguments: object) -> tuple[int, str, list[dict[str, Any]]]:
    process = start_training(["--config", config, "--run-dir", place / run, *arguments], place / f"{run}.txt")
    code = process.wait()
    return code, process.output, metrics_of(place / run)


def counts(lines: list[dict[str, Any]]) -> list[int]:
    return [int(line["bad_documents"]) for line in lines if "bad_documents" in line]


@pytest.mark.parametrize("keys", [{"on_bad_data": "skip"}, {"skip_bad_documents": True}])
def test_skipped_documents_are_counted_and_named(folder: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    code, output, lines = train(tmp_path, config_of(tmp_path, folder, **keys))
    assert code == 0, output
    found = counts(lines)
    assert found == sorted(found) and found[-1] == 5 and len(found) == 15
    for number in BAD:
        assert output.count(f"a.bin: document {number} at byte") == 1
    assert output.count("token 99 at position 3 is outside the vocabulary of 61") == 5


def test_a_bad_document_stops_the_run_by_default(folder: Path, tmp_path: Path) -> None:
    code, output, lines = train(tmp_path, config_of(tmp_path, folder))
    assert code == 2 and "data.on_bad_data = 'skip', which skips up to data.max_bad_documents" in output, output
    assert len(lines) < 15 and counts(lines) == []


def test_the_limit_is_over_all_ranks_and_survives_a_resume(folder: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"on_bad_data": "skip", "micro_num": 2, "max_bad_documents": 4}
    config = config_of(tmp_path, folder, **keys)
    processes = start_ranks(["--config", config, "--run-dir", tmp_path / "two"], tmp_path)
    codes = [process.wait() for process in processes]
    assert codes == [2, 2], processes[0].output
    assert "5 documents could not be read since the start of the run, over all ranks" in processes[0].output
    assert "data.max_bad_documents = 4 permits no more" in processes[0].output
    both = counts(metrics_of(tmp_path / "two"))
    logs = "".join(process.output for process in processes)
    assert logs.count("outside the vocabulary") == 5 and all(process.output.count("at byte") for process in processes)
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert 0 < both[saved - 1] < 5
    # One rank goes on, in the epoch and beyond, with another limit.
    more = config_of(tmp_path, folder, **keys | {"micro_num": 4, "max_bad_documents": 8, "total_steps": 60})
    code, output, lines = train(tmp_path, more, "one")
    assert code == 2 and f"resuming at step {saved}" in output, output
    # The first number above 8; two may be in one step.
    assert re.search(r": (9|10) documents could not be read since the start of the run", output), output
    resumed = counts(lines)
    assert resumed[: len(both) - saved] == both[saved:]


def test_two_names_of_one_thing_must_agree(folder: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, folder, on_bad_data="stop", skip_bad_documents=True)
    code, output, _ = train(tmp_path, config, "run", "--dry-run")
    assert code == 2 and "data.on_bad_data = 'stop' contradicts data.skip_bad_documents = True" in output, output
