"""What a save leaves behind when it succeeds, fails or is killed, in the foreground and beside it."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.full_disk import no_file_larger_than
from helpers.ranks import RankPool
from helpers.runs import assert_same_bits, new_trainer, steps_in, train, weights_of

from internlm.checkpoint import save_folder
from internlm.checkpoint.background import SharedMemory
from internlm.checkpoint.manager import CheckpointManager
from internlm.checkpoint.manifest import read_manifest
from internlm.checkpoint.run_state import load_weights
from internlm.checkpoint.save_folder import find_checkpoints
from internlm.checkpoint.tensor_files import TensorReader, write_weights
from internlm.checkpoint.weight_source import LazyTensor
from internlm.config.schema import Config
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import StoragePath, storage_path


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Any]:
    """After two steps, nothing saved."""
    trainer: Any = new_trainer(None, 2, dtype="torch.bfloat16")
    trainer.fit()
    trainer.checkpointer = CheckpointManager(tmp_path)
    yield trainer
    trainer.checkpointer.drain()


def in_background(trainer: Any, folder: Path, **options: Any) -> CheckpointManager:
    trainer.checkpointer = CheckpointManager(folder, async_save=True, **options)
    return trainer.checkpointer


def test_what_is_saved_in_the_background_is_the_instant_of_the_call(tmp_path: Path, trainer: Any) -> None:
    manager = in_background(trainer, tmp_path)
    before = weights_of(trainer.engine.model)
    for _ in range(2):
        manager.save(trainer)
        # What training does next must not reach the file.
        with torch.no_grad():
            for parameter in trainer.engine.model.parameters():
                parameter.zero_()
        manager.finish()
        (result,) = manager.poll()
        assert result.error is None and (result.path.local, result.step) == (tmp_path / "2", 2)
        assert result.seconds_stalled < result.seconds_written
        other = new_trainer(None, 2, dtype="torch.bfloat16", seed=5)
        CheckpointManager(tmp_path).load(other, tmp_path / "2")
        assert_same_bits(weights_of(other.engine.model), before)
        CheckpointManager(tmp_path).load(trainer, tmp_path / "2")


def test_runs_that_save_in_the_background_end_with_the_same_checkpoints(tmp_path: Path) -> None:
    train(tmp_path / "here", 6, every=2)
    trainer: Any = new_trainer(tmp_path / "beside", 6, every=2)
    in_background(trainer, tmp_path / "beside")
    torch.manual_seed(99)
    trainer.fit()
    assert steps_in(tmp_path / "beside") == steps_in(tmp_path / "here") == [2, 4, 6]
    for step in ("2", "4", "6"):
        here, beside = (TensorReader(storage_path(tmp_path / kind / step)) for kind in ("here", "beside"))
        assert here.entries == beside.entries
        assert all(torch.equal(here.read_key(key), beside.read_key(key)) for key in here.entries)
    assert sorted(os.listdir(tmp_path / "beside")) == ["2", "4", "6"]


def test_a_killed_writer_loses_one_save_and_no_more(tmp_path: Path, trainer: Any) -> None:
    manager = in_background(trainer, tmp_path)
    manager.save(trainer)
    manager.drain()
    trainer.state.step = 3
    os.kill(manager._background._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
    manager.save(trainer)
    os.kill(manager._background._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="process that writes checkpoints has ended, with exit code -9"):
        manager.finish()
    assert [result.error is None for result in manager.poll()] == [True, False]
    assert steps_in(tmp_path) == [2]
    manager.save(trainer)
    manager.finish()
    assert steps_in(tmp_path) == [2, 3]
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]


def test_signals_that_end_a_run_do_not_reach_the_writer(tmp_path: Path, trainer: Any) -> None:
    manager = in_background(trainer, tmp_path)
    manager.save(trainer)
    manager.drain()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(manager._background._process.pid, number)  # type: ignore[union-attr]
    manager.save(trainer)
    manager.finish()
    assert [result.error for result in manager.poll()] == [None, None]


def export(path: StoragePath) -> None:
    (path.parent / f"{path.name}_copy").make_folder()


def failing_export(path: StoragePath) -> None:
    raise ValueError("no such layout")


@pytest.mark.parametrize("async_save", [False, True])
def test_what_follows_a_save_may_fail_without_it(tmp_path: Path, trainer: Any, async_save: bool) -> None:
    for function, notice in ((export, None), (failing_export, "failing_export failed: ValueError: no such layout")):
        # The process beside this one imports the function by its name.
        function.__module__ = "test_manager"
        manager = CheckpointManager(tmp_path, async_save=async_save, after_save=function)
        if async_save:
            manager._background.close()  # type: ignore[union-attr]
            manager._background = None
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(str(Path(__file__).parent))
                manager.save(trainer)
        else:
            manager.save(trainer)
        manager.finish()
        (result,) = manager.poll()
        assert (result.error, result.notice) == (None, notice)
    assert steps_in(tmp_path) == [2]
    assert (tmp_path / "2_copy").is_dir()


# -- which checkpoints there are ---------------------------------------------------------------------------------------


def test_the_newest_checkpoint_that_is_whole_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, 6, every=2)
    data = tmp_path / "6" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    (tmp_path / "4" / "context.json").unlink()
    trainer: Any = new_trainer(tmp_path, 6)
    with caplog.at_level(logging.ERROR, "internlm"):
        found = trainer.checkpointer.resume(trainer)
    assert (found.step, trainer.state.step) == (2, 2)
    assert "6' is damaged:\n  __0_0.distcp has checksum " in caplog.text
    assert "4' is damaged:\n  context.json is missing" in caplog.text


def test_a_folder_of_damaged_checkpoints_is_no_reason_to_start_from_scratch(tmp_path: Path) -> None:
    train(tmp_path, 2, every=2)
    (tmp_path / "2" / "2.step").write_text("{")
    trainer: Any = new_trainer(tmp_path, 6)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .* is intact"):
        trainer.checkpointer.resume(trainer)
    (tmp_path / "2" / "2.step").write_text('{"format": 99, "step": 2, "contents": [], "files": {}}')
    with pytest.raises(CheckpointError, match="format 99, and this version reads 1"):
        trainer.checkpointer.load(trainer, tmp_path / "2")


def test_snapshots_take_turns_and_the_newest_of_all_is_resumed(tmp_path: Path, trainer: Any) -> None:
    manager = CheckpointManager(tmp_path / "saved", snapshot_folder=tmp_path / "shots")
    for step in (1, 2, 3):
        trainer.state.step = step
        manager.save(trainer, snapshot=True)
        slots = {
            found.path.name: found.step for found in find_checkpoints(manager.save_folder, manager.snapshot_folder)
        }
        assert slots[str((step - 1) % 2)] == step
        assert set(slots.values()) == {step, step - 1} - {0}
    trainer.state.step = 2
    manager.save(trainer)
    assert manager.resume(trainer).path.local == tmp_path / "shots" / "0"  # type: ignore[union-attr]
    assert trainer.state.step == 3
    trainer.state.step = 3
    manager.save(trainer)
    # Of the same step, the one that nothing replaces.
    assert manager.resume(trainer).path.local == tmp_path / "saved" / "3"  # type: ignore[union-attr]


def test_only_the_latest_are_kept(tmp_path: Path, trainer: Any) -> None:
    manager = CheckpointManager(tmp_path, keep_latest=2)
    for step in (2, 10, 9, 30):
        trainer.state.step = step
        manager.save(trainer)
        manager.save(trainer, snapshot=True)
    assert sorted(os.listdir(tmp_path)) == ["10", "30", "snapshot"]
    assert sorted(os.listdir(tmp_path / "snapshot")) == ["0", "1"]


def test_a_run_that_starts_anew_keeps_its_own_checkpoints_beside_later_ones(
    tmp_path: Path, trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Counted by step alone, those of the older run would be the latest, and all of the new run be removed."""
    manager = CheckpointManager(tmp_path, keep_latest=1)
    for step in (8, 9):
        trainer.state.step = step
        manager.save(trainer)
        manager.save(trainer, snapshot=True)
    with caplog.at_level(logging.WARNING, "internlm"):
        manager.warn_of_later(trainer.context, 9)
        assert caplog.text == ""
        manager.warn_of_later(trainer.context, 2)
    assert f"starts at step 2, and its folder has checkpoints of later steps:\n  {tmp_path}/snapshot/0" in caplog.text
    assert f"{tmp_path}/9\n" in caplog.text
    for step in (2, 4):
        trainer.state.step = step
        manager.save(trainer)
        manager.save(trainer, snapshot=True)
    assert sorted(os.listdir(tmp_path)) == ["4", "9", "snapshot"]
    assert [found.step for found in find_checkpoints(storage_path(tmp_path)) if found.is_snapshot] == [2, 4]


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_failed_save_leaves_no_trace_and_the_older_ones(
    tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager: CheckpointManager = trainer.checkpointer
    manager.save(trainer)
    trainer.state.step = 3
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        manager.save(trainer)
    fix = "free space on that disk (or in your quota), or choose another folder"
    assert [result.error for result in manager.poll()] == [None, f"cannot write a file: no space left on device; {fix}"]
    assert os.listdir(tmp_path) == ["2"]
    with pytest.raises(CheckpointError, match=r"the last checkpoint could not be saved: .*no space left"):
        manager.finish()
    manager.save(trainer)
    manager.finish()
    assert steps_in(tmp_path) == [2, 3]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_is_told_also_where_the_library_hides_it(tmp_path: Path, async_save: bool) -> None:
    """A disk that is full in the middle of a tensor: torch.save then fails in its clean-up, for a reason of its own."""
    trainer: Any = new_trainer(None, 1, vocab_size=8192)
    with no_file_larger_than(3 << 19):
        manager = CheckpointManager(tmp_path, async_save=async_save)
        if not async_save:
            manager.save(trainer)
    if async_save:
        # The limit is that of the process which writes; the copy in memory is larger.
        manager.save(trainer)
    with pytest.raises(CheckpointError) as error:
        manager.finish()
    told = (
        r"the last checkpoint could not be saved: cannot write '.*/__0_0\.distcp': file too large; choose a file system"
    )
    assert re.fullmatch(f"{told} that supports files of that size", str(error.value))
    assert os.listdir(tmp_path) == []


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("async_save", [False, True])
def test_when_one_rank_cannot_save_none_has(tmp_path: Path, ranks: Callable[[int], RankPool], async_save: bool) -> None:
    for error in ranks(2).run(save_with_a_failure_on_rank_one, str(tmp_path), async_save):
        assert error is not None and "rank 1: " in error and "no space left" in error.lower()
    assert steps_in(tmp_path) == [2]
    assert os.listdir(tmp_path) == ["2"]


def save_with_a_failure_on_rank_one(folder: str, async_save: bool) -> str | None:
    trainer: Any = new_trainer(None, 2)
    trainer.fit()
    manager = CheckpointManager(folder, async_save=async_save)
    manager.save(trainer)
    manager.drain()
    trainer.state.step = 3
    with pytest.MonkeyPatch.context() as patch:
        if trainer.context.rank == 1:
            if async_save:
                patch.setattr(SharedMemory, "bytes", no_memory)
            else:
                patch.setattr(torch, "save", full_disk)
        manager.save(trainer)
    try:
        manager.finish()
    except CheckpointError as error:
        return str(error)
    return None


def no_memory(self: SharedMemory, size: int) -> None:
    raise CheckpointError("No space left for the copy")


def test_a_copy_for_which_there_is_no_memory_is_refused_and_the_run_goes_on(tmp_path: Path, trainer: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no memory for the copy of a checkpoint \(1048576.0 GiB on this rank\)"):
        SharedMemory().bytes(2**50)
    manager = in_background(trainer, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedMemory, "bytes", no_memory)
        manager.save(trainer)
    (result,) = manager.poll()
    assert result.error == "No space left for the copy"
    manager.save(trainer)
    manager.finish()
    assert os.listdir(tmp_path) == ["2"]


def test_a_folder_that_cannot_be_written_is_found_at_the_start(tmp_path: Path, trainer: Any) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be saved to '.*file"):
        CheckpointManager(tmp_path / "file").check_writable(trainer.context)
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be saved to '.*file"):
        CheckpointManager(tmp_path / "new", snapshot_folder=tmp_path / "file").check_writable(trainer.context)
    CheckpointManager(tmp_path / "new").check_writable(trainer.context)
    assert os.listdir(tmp_path / "new") == []


# -- weights alone, and models that are not the same -------------------------------------------------------------------


def write_some(folder: Path, trainer: Any, rename: Callable[[str], str | None]) -> StoragePath:
    tensors = {}
    for name, tensor in weights_of(trainer.engine.model).items():
        new = rename(name)
        if new is not None:
            tensors[new] = LazyTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
    model = {"num_layers": 1, "vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1}
    config = Config.model_validate({"model": model, "data": {"seq_len": 8, "micro_bsz": 1, "total_steps": 1}})
    return write_weights(storage_path(folder), tensors, config=config, files={"hf/tokenizer.json": b"{}"})


def test_weights_alone_are_a_checkpoint_that_a_run_starts_from(tmp_path: Path, trainer: Any) -> None:
    path = write_some(tmp_path, trainer, lambda name: name)
    manifest = read_manifest(path)
    assert manifest is not None and manifest.contents == ("model",) and "hf/tokenizer.json" in manifest.files
    reader = TensorReader(path)
    weights = weights_of(trainer.engine.model)
    assert_same_bits({name: reader.read(name) for name in reader.names()}, weights)
    other: Any = new_trainer(tmp_path, 2, dtype="torch.bfloat16", seed=5)
    assert other.checkpointer.resume(other).step == 0
    assert_same_bits(weights_of(other.engine.model), weights)
    with pytest.raises(CheckpointError, match="contains only model, not optimizer"):
        other.checkpointer.load(other, path, ("model", "optimizer"))
    with pytest.raises(CheckpointError, match="has no tensor 'model/nothing'"):
        reader.read_key("model/nothing")


@pytest.mark.parametrize("as_source", [False, True])
def test_missing_and_unexpected_weights_are_named(
    tmp_path: Path, trainer: Any, caplog: pytest.LogCaptureFixture, as_source: bool
) -> None:
    path = write_some(tmp_path, trainer, lambda name: "norm.scale" if name == "norm.weight" else name)
    other: Any = new_trainer(tmp_path, 2, dtype="torch.bfloat16", seed=5)
    before = weights_of(other.engine.model)

    def load(strict: bool) -> None:
        if as_source:
            load_weights(other, TensorReader(path), f"'{path}'", strict=strict)
        else:
            other.checkpointer.load(other, path, ("model",), strict=strict)

    prefix = "" if as_source else "model/"
    message = f"'{prefix}norm.weight' is missing\n  '{prefix}norm.scale' is not part of the model"
    with pytest.raises(CheckpointError, match=message):
        load(strict=True)
    assert_same_bits(weights_of(other.engine.model), before)
    with caplog.at_level(logging.WARNING, "internlm"):
        load(strict=False)
    assert message in caplog.text
    expected = {**weights_of(trainer.engine.model), "norm.weight": before["norm.weight"]}
    assert_same_bits(weights_of(other.engine.model), expected)
    # An update with learning rate 0 writes the masters back.
    other.schedules, other.total_steps, other.hooks = {"lr": lambda step: 0.0}, 1, []
    other.fit()
    assert_same_bits(weights_of(other.engine.model), expected)


def test_an_old_checkpoint_that_cannot_be_removed_is_told_and_the_new_one_counts(
    tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CheckpointManager(tmp_path, keep_latest=1)
    manager.save(trainer)
    trainer.state.step = 3
    monkeypatch.setattr(save_folder, "remove_checkpoint", full_disk)
    manager.save(trainer)
    manager.finish()
    notice = "older checkpoints could not be removed: [Errno 28] No space left on device"
    assert [(result.error, result.notice) for result in manager.poll()] == [(None, None), (None, notice)]
    assert steps_in(tmp_path) == [2, 3]
