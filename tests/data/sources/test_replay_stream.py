"""Recorded batches are replayed row by row, for any number of ranks and workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.sources.replay_stream import ReplayStream
from internlm.utils.errors import DataError

STEPS, RANKS, ROWS, SEQ_LEN = 3, 12, 2, 4


def record(folder: Path, prefix: str = "") -> np.ndarray:
    """Files of 12 ranks with two rows each; returns the ids [steps, rows, seq_len]. Labels are the ids plus 1."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(0).integers(0, 90, (STEPS, RANKS, ROWS, SEQ_LEN))
    for step in range(STEPS):
        for rank in range(RANKS):
            tokens = torch.from_numpy(ids[step, rank])
            labels = tokens + 1
            labels[:, -1] = -100
            torch.save(tokens, folder / f"{prefix}tokens_step{step + 1}_dp{rank}.pt")
            torch.save(labels, folder / f"{prefix}labels_step{step + 1}_dp{rank}.pt")
    return ids.reshape(STEPS, RANKS * ROWS, SEQ_LEN)


def stream(place: Path, **changes: Any) -> ReplayStream:
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "micro_bsz": 2, "rows_per_step": RANKS * ROWS, "packing": "cut"}
    return ReplayStream(place, **{**options, "vocab_size": 100, **changes})


@pytest.mark.parametrize("packing", ["cut", "pack_sample_into_one", "unpacked", "best_fit"])
@pytest.mark.parametrize(("micro_bsz", "data_size", "num_workers"), [(2, 1, 0), (3, 4, 0), (1, 2, 2), (4, 3, 0)])
def test_rows_are_those_of_the_recording(
    tmp_path: Path, packing: str, micro_bsz: int, data_size: int, num_workers: int
) -> None:
    ids = record(tmp_path)
    micro_num = RANKS * ROWS // micro_bsz // data_size
    loaders = [
        build_train_loader(
            stream(tmp_path, micro_bsz=micro_bsz, packing=packing),
            micro_num=micro_num,
            data_rank=rank,
            data_size=data_size,
            num_workers=num_workers,
            total_steps=STEPS,
        )
        for rank in range(data_size)
    ]
    for step in range(STEPS):
        micros = [micro for loader in loaders for micro in next(loader).micro_batches]
        found = torch.cat([micro.input_ids.reshape(-1, SEQ_LEN) for micro in micros]).numpy()
        labels = torch.cat([micro.labels.reshape(-1, SEQ_LEN) for micro in micros]).numpy()
        assert (found == ids[step]).all()
        assert (labels[:, :-1] == ids[step][:, :-1] + 1).all() and (labels[:, -1] == -100).all()
        for micro in micros:
            assert micro.position_ids.reshape(-1, SEQ_LEN).tolist() == [list(range(SEQ_LEN))] * micro_bsz
            assert micro.lengths == (None if packing == "unpacked" else (SEQ_LEN,) * micro_bsz)
    for loader in loaders:
        loader.close()


def test_a_prefix_names_a_recording(tmp_path: Path) -> None:
    ids = record(tmp_path / "runs", "a_")
    record(tmp_path / "runs", "b_")
    for place in (tmp_path / "runs" / "a", tmp_path / "runs" / "a_"):
        replayed = stream(place)
        assert replayed.num_steps == STEPS and (replayed.sample(0).input_ids == ids[0, :2].reshape(-1)).all()
    with pytest.raises(DataError, match=r"recordings with several prefixes; name one .*runs/a, .*runs/b"):
        stream(tmp_path / "runs")


def test_resuming_needs_no_replay(tmp_path: Path) -> None:
    ids = record(tmp_path)
    loader = build_train_loader(stream(tmp_path), micro_num=12)
    loader.seek(2, 24)
    assert (next(loader).micro_batches[0].input_ids[0].numpy() == ids[2, :2].reshape(-1)).all()
    with pytest.raises(DataError, match="the recording ends after step 3"):
        next(loader)
    loader.close()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "labels_step2_dp3.pt").unlink(), "labels_step2_dp3 is missing, of 3 steps and 12 data ranks"),
        (lambda f: (f / "tokens_step1_dp3.pt").write_bytes(b"x"), "tokens_step1_dp3.pt: not a tensor"),
        (lambda f: torch.save(torch.zeros(2, 4), f / "tokens_step1_dp0.pt"), r"float32 \[2, 4\]; expected integers"),
        (
            lambda f: torch.save(torch.zeros(2, 5).long(), f / "tokens_step1_dp0.pt"),
            "rows of 5 tokens, but data.seq_",
        ),
        (lambda f: torch.save(torch.zeros(1, 4).long(), f / "tokens_step1_dp0.pt"), "has shape .*dp0.pt has"),
        (
            lambda f: torch.save(torch.full((2, 4), 100), f / "labels_step1_dp1.pt"),
            "100 in row 0, column 0, is out",
        ),
        (lambda f: torch.save({"a": 1}, f / "labels_step1_dp1.pt"), "labels_step1_dp1.pt: dict; expected integers"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    record(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        stream(tmp_path)


@pytest.mark.parametrize(
    ("junk", "message"),
    [
        (lambda path: path.write_bytes(b"x"), "labels_step3_dp7.pt: not a tensor"),
        (lambda path: torch.save(torch.zeros(2, 4), path), r"step3_dp7.pt: torch.float32 \[2, 4\]; expected integers"),
        (lambda path: torch.save(torch.zeros(3, 4).long(), path), "step3_dp7.pt has shape"),
    ],
)
def test_a_check_finds_junk_in_later_steps(tmp_path: Path, junk: Any, message: str) -> None:
    record(tmp_path)
    assert stream(tmp_path).check().endswith("3 steps of 24 rows, of which 3 were checked for shape and dtype")
    junk(tmp_path / "labels_step3_dp7.pt")
    with pytest.raises(DataError, match=message):
        stream(tmp_path).check()


def test_another_global_batch_is_refused(tmp_path: Path) -> None:
    record(tmp_path)
    with pytest.raises(DataError, match=r"step 1 has 24 recorded rows, but data\.micro_num \* .* = 16"):
        stream(tmp_path, rows_per_step=16)
    with pytest.raises(DataError, match="no recorded batches; expected tokens_step1_dp0"):
        stream(tmp_path / "nothing")
    with pytest.raises(DataError, match="no such folder"):
        stream(tmp_path / "no" / "thing")
