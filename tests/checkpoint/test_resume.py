"""Resuming is exact, in the same layout bit for bit, and in another one to the tolerance of fp32 sums."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.runs import assert_same_bits, new_trainer, steps_in, train

from internlm.checkpoint import save_folder
from internlm.checkpoint.save_folder import resolve
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import storage_path


def both_ways(folder: str, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """10 steps in one go, and 5, a resume, and 5 more."""
    straight = train(f"{folder}/straight", 10, **kwargs)
    first = train(f"{folder}/parts", 5, **kwargs)
    second = train(f"{folder}/parts", 10, f"{folder}/parts/5", **kwargs)
    for key in ("losses", "norms", "random"):
        second[key] = first[key] + second[key]
    return straight, second


def check_exact(straight: dict[str, Any], resumed: dict[str, Any]) -> None:
    for key in ("losses", "norms", "random", "state", "skipped"):
        assert straight[key] == resumed[key], key
    assert_same_bits(straight["weights"], resumed["weights"])


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16", "torch.float16"])
def test_ten_steps_are_five_and_five_on_one_process(tmp_path: Path, dtype: str) -> None:
    check_exact(*both_ways(str(tmp_path), dtype=dtype))


@pytest.mark.parametrize(("zero", "dtype"), [(-1, "torch.float32"), (1, "torch.float32"), (-1, "torch.bfloat16")])
def test_ten_steps_are_five_and_five_on_two_processes(
    tmp_path: Path, ranks: Callable[[int], RankPool], zero: int, dtype: str
) -> None:
    for straight, resumed in ranks(2).run(both_ways_on_ranks, str(tmp_path), zero, dtype):
        check_exact(straight, resumed)


def both_ways_on_ranks(folder: str, zero: int, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return both_ways(folder, zero=zero, dtype=dtype)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_another_number_of_processes_goes_on_within_rounding(
    tmp_path: Path, ranks: Callable[[int], RankPool], before: int, after: int
) -> None:
    straight = train(tmp_path / "straight", 10)
    on = {1: lambda *args: [run(*args)], 2: ranks(2).run, 4: ranks(4).run}
    first = _on(on, before, str(tmp_path / "parts"), 5, None)
    second = _on(on, after, str(tmp_path / "parts"), 10, str(tmp_path / "parts" / "5"))
    losses = first["losses"] + second["losses"]
    torch.testing.assert_close(losses, straight["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(first["norms"] + second["norms"], straight["norms"], rtol=1e-4, atol=0)
    assert second["state"] == straight["state"]


def run(folder: str, steps: int, resume: str | None) -> dict[str, Any]:
    return train(folder, steps, resume)


def _on(on: dict[int, Any], world: int, *args: Any) -> dict[str, Any]:
    if world == 1:
        return on[1](*args)[0]
    return on[world](run, *args)[0]


def test_weights_alone_can_be_loaded_and_masters_follow(tmp_path: Path) -> None:
    done = train(tmp_path, 5, dtype="torch.bfloat16")
    trainer = new_trainer(tmp_path, 5, dtype="torch.bfloat16", seed=1234)
    trainer.checkpointer.load(trainer, tmp_path / "5", ("model",))  # type: ignore[union-attr]
    assert trainer.state.step == 0
    before = {name: p.detach().clone() for name, p in trainer.engine.model.named_parameters()}
    assert_same_bits(before, done["weights"])
    # An update with learning rate 0 writes the masters back: they must be the loaded weights.
    trainer.schedules["lr"] = lambda step: 0.0
    trainer.total_steps = 1
    trainer.hooks = []
    trainer.fit()
    assert_same_bits({n: p.detach() for n, p in trainer.engine.model.named_parameters()}, before)


def test_an_incomplete_checkpoint_is_never_picked(tmp_path: Path) -> None:
    train(tmp_path, 5, every=2)
    assert steps_in(tmp_path) == [2, 4, 5]
    assert not list(tmp_path.glob(".writing*"))
    (tmp_path / "5" / "5.step").unlink()
    (tmp_path / ".writing-6").mkdir()
    assert steps_in(tmp_path) == [2, 4]
    assert resolve(storage_path(tmp_path)).local == tmp_path / "4"
    with pytest.raises(CheckpointError, match=r"'.*5' is incomplete: its manifest '5.step' is missing"):
        resolve(storage_path(tmp_path / "5"))
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(storage_path(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resolve(storage_path(tmp_path / "empty"))


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path, 5)
    wider = new_trainer(tmp_path, 5, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"'model/layers.0.feed_forward.w1.weight' has shape \[56, 32\]"):
        wider.checkpointer.load(wider, tmp_path / "5")  # type: ignore[union-attr]
    deeper = new_trainer(tmp_path, 5, num_layers=3)
    with pytest.raises(CheckpointError, match=r"'model/layers.2.attention.wo.weight' is missing"):
        deeper.checkpointer.load(deeper, tmp_path / "5")  # type: ignore[union-attr]
    same = new_trainer(tmp_path, 5)
    with pytest.raises(CheckpointError, match="unknown checkpoint content"):
        same.checkpointer.load(same, tmp_path / "5", ("weights",))  # type: ignore[union-attr]


def test_a_damaged_checkpoint_is_refused_with_its_path(tmp_path: Path) -> None:
    train(tmp_path, 5)
    data = tmp_path / "5" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])
    trainer = new_trainer(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"(?s)'.*5' is damaged:.*__0_0.distcp has 1,000 bytes, .* were written"):
        trainer.checkpointer.load(trainer, tmp_path / "5")  # type: ignore[union-attr]
    (tmp_path / "5" / "context.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"context.json has 1 bytes"):
        trainer.checkpointer.load(trainer, tmp_path / "5")  # type: ignore[union-attr]


def test_a_save_that_cannot_be_written_names_the_folder(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot prepare '.*file"):
        train(blocked, 5)


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float32"])
def test_optimizer_state_alone_leaves_the_weights_alone(tmp_path: Path, dtype: str) -> None:
    """The masters are weights: without "model" they stay those of the new run, in any number format."""
    done = new_trainer(tmp_path, 5, dtype=dtype)
    done.fit()
    trainer = new_trainer(tmp_path, 5, dtype=dtype, seed=1234)
    before = {name: p.detach().clone() for name, p in trainer.engine.model.named_parameters()}
    trainer.checkpointer.load(trainer, tmp_path / "5", ("optimizer",))  # type: ignore[union-attr]
    assert trainer.state.step == 0
    assert trainer.engine.optimizer.num_updates == 5  # type: ignore[attr-defined]
    for kind in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(moments(trainer, kind), moments(done, kind))
    # An update with learning rate 0 writes the masters into the parameters.
    trainer.schedules["lr"] = lambda step: 0.0
    trainer.total_steps, trainer.hooks = 1, []
    trainer.fit()
    assert_same_bits({name: p.detach() for name, p in trainer.engine.model.named_parameters()}, before)


def moments(trainer: Any, kind: str) -> dict[str, torch.Tensor]:
    """A copy of one of AdamW's moments by parameter."""
    return {
        key: piece.clone()
        for key, _, pieces in trainer.engine.optimizer.sharded_state()
        for _, piece in pieces
        if key.startswith(f"{kind}/")
    }


def test_a_save_killed_while_it_replaces_one_of_the_same_step_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    train(tmp_path, 5, every=5)
    real, calls = os.replace, []

    def killed_at_the_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KilledError
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at_the_second)
        with pytest.raises(KilledError):
            train(tmp_path, 5, every=5, seed=8)
    assert steps_in(tmp_path) == []
    trainer = new_trainer(tmp_path, 10)
    found = trainer.checkpointer.resume(trainer)  # type: ignore[union-attr]
    assert found.path.local == tmp_path / "5"
    assert trainer.state.step == 5
    train(tmp_path, 6, tmp_path / "5", every=6)
    assert steps_in(tmp_path) == [5, 6]
    assert not list(tmp_path.glob(".writing*"))


def test_all_ranks_resume_from_what_the_main_rank_sees(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    """Even when another machine does not see the newest folder yet."""
    train(tmp_path, 5, every=2)
    assert ranks(2).run(newest_with_a_stale_view, str(tmp_path)) == [str(tmp_path / "5")] * 2


def newest_with_a_stale_view(folder: str) -> str:
    trainer = new_trainer(folder, 5)
    real = save_folder.find_checkpoints
    save_folder.find_checkpoints = lambda *args: real(*args)[:-1] if trainer.context.rank == 1 else real(*args)
    try:
        return str(trainer.checkpointer.candidates(trainer.context)[-1].path)  # type: ignore[union-attr]
    finally:
        save_folder.find_checkpoints = real
