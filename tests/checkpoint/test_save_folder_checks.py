"""A save replaces what a save of this program has left, and nothing else: not before the first step, not later."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import metrics_of, start_training, write_config
from helpers.runs import new_trainer, steps_in

from internlm.checkpoint import save_folder
from internlm.checkpoint.manager import CheckpointManager
from internlm.checkpoint.manifest import Manifest
from internlm.checkpoint.save_folder import SNAPSHOT_SLOTS, begin_writing, finish_writing, why_not_replaceable
from internlm.utils.errors import CheckpointError, StorageError
from internlm.utils.storage import StoragePath, storage_path


def internevo(folder: Path, step: int = 10) -> dict[str, str]:
    """A checkpoint as InternEvo names its files; returns what is in it."""
    files = {
        "model_tp0_pp0.pt": "weights",
        "optimizer_tp0_pp0_zo0.pt": "moments",
        "context.pt": "c",
        f"{step}.step": "",
    }
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content)
    return files


def content_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Any]:
    """After two steps, nothing saved."""
    trainer: Any = new_trainer(None, 2)
    trainer.fit()
    trainer.checkpointer = CheckpointManager(tmp_path / "saved")
    yield trainer


# -- before the first step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resumes", [False, True])
def test_a_run_does_not_start_where_it_would_replace_a_checkpoint_of_internevo(tmp_path: Path, resumes: bool) -> None:
    files = internevo(tmp_path / "checkpoints" / "10")
    config = write_config(tmp_path, f"ckpt['auto_resume'] = {resumes}")
    command = start_training(["--config", config, "--run-dir", tmp_path / "run"], tmp_path / "out.txt")
    assert command.wait() == 2, command.output
    assert metrics_of(tmp_path / "run") == []
    assert content_of(tmp_path / "checkpoints" / "10") == files
    assert f"'{tmp_path}/checkpoints/10' is a checkpoint of InternEvo" in command.output
    assert "Traceback" not in command.output
    if not resumes:
        assert f"saves its steps 1 to 10 in '{tmp_path}/checkpoints'" in command.output
        assert "move that away, or set ckpt.save_ckpt_folder to another folder" in command.output


def fill(folder: Path, kind: str, trainer: Any) -> None:
    """What may lie under the number of a step."""
    if kind == "file":
        folder.write_text("mine")
        return
    folder.mkdir(parents=True)
    if kind in ("no manifest", "damaged manifest"):
        (folder / "__0_0.distcp").write_text("of another program")
    if kind == "damaged manifest":
        (folder / f"{folder.name}.step").write_text("{")
    if kind == "another step":
        folder.rmdir()
        trainer.checkpointer.save(trainer)
        trainer.checkpointer.finish()
        (folder.parent / "2").rename(folder)
        (folder / "2.step").rename(folder / "5.step")


REASONS = {
    "file": "is a file",
    "no manifest": "has no manifest of a complete checkpoint",
    "damaged manifest": "has a manifest that cannot be read",
    "another step": "holds the checkpoint of step 2",
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_lies_there_is_named(tmp_path: Path, trainer: Any, kind: str) -> None:
    manager: CheckpointManager = trainer.checkpointer
    (tmp_path / "saved").mkdir()
    fill(tmp_path / "saved" / "5", kind, trainer)
    with pytest.raises(CheckpointError, match=f"'{tmp_path}/saved/5' {REASONS[kind]}"):
        manager.check_room(trainer.context, 1, 10)
    # Only the steps of this run count, the first and the last of them too.
    manager.check_room(trainer.context, 6, 10)
    manager.check_room(trainer.context, 1, 4)
    with pytest.raises(CheckpointError, match="saved/5' "):
        manager.check_room(trainer.context, 5, 5)
    trainer.state.step = 5
    manager.save(trainer)
    with pytest.raises(CheckpointError, match=f"saved/5' {REASONS[kind]}, so it is not replaced: move it away"):
        manager.finish()


def test_what_a_run_has_left_itself_is_replaced(tmp_path: Path, trainer: Any) -> None:
    manager: CheckpointManager = trainer.checkpointer
    for _ in range(2):
        manager.save(trainer)
        manager.save(trainer, snapshot=True)
        manager.save(trainer, snapshot=True)
        (tmp_path / "saved" / "3").mkdir(exist_ok=True)  # empty
        manager.check_room(trainer.context, 1, 10, snapshots=True)
    manager.finish()
    assert {result.error for result in manager.poll()} == {None}
    assert steps_in(tmp_path / "saved") == [2, 2, 2]


@pytest.mark.parametrize("slot", SNAPSHOT_SLOTS)
def test_places_of_snapshots_and_exports_count_too(tmp_path: Path, trainer: Any, slot: str) -> None:
    files = internevo(tmp_path / "saved" / "snapshot" / slot, 7)
    manager: CheckpointManager = trainer.checkpointer
    manager.check_room(trainer.context, 1, 10)
    with pytest.raises(CheckpointError, match=f"snapshot/{slot}' is a checkpoint of InternEvo"):
        manager.check_room(trainer.context, 1, 10, snapshots=True)
    manager.save(trainer, snapshot=True)
    manager.save(trainer, snapshot=True)
    assert content_of(tmp_path / "saved" / "snapshot" / slot) == files
    (tmp_path / "saved" / "4_hf").mkdir()
    manager.check_room(trainer.context, 1, 10)
    manager.after_save = print
    with pytest.raises(CheckpointError, match="4_hf' is an export, and its checkpoint is not there"):
        manager.check_room(trainer.context, 1, 10)


def test_keep_latest_counts_and_removes_only_its_own(tmp_path: Path, trainer: Any) -> None:
    manager = trainer.checkpointer = CheckpointManager(tmp_path / "saved", keep_latest=1)
    files = {step: internevo(tmp_path / "saved" / str(step), step) for step in (1, 100)}
    for step in (2, 3):
        trainer.state.step = step
        manager.save(trainer)
    manager.finish()
    assert steps_in(tmp_path / "saved") == [1, 3, 100]
    assert all(content_of(tmp_path / "saved" / str(step)) == files[step] for step in files)


# -- later -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_background", [False, True])
def test_a_folder_that_appears_in_mid_run_makes_the_save_fail(
    tmp_path: Path, trainer: Any, in_background: bool
) -> None:
    manager = CheckpointManager(tmp_path / "saved", async_save=in_background)
    files = internevo(tmp_path / "saved" / "2", 2)
    manager.save(trainer)
    with pytest.raises(CheckpointError, match=r"2' is a checkpoint of InternEvo .* it is not replaced"):
        manager.finish()
    assert content_of(tmp_path / "saved" / "2") == files
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["2"]
    trainer.state.step = 3
    manager.save(trainer)
    manager.finish()


@pytest.mark.parametrize("has_older", [False, True])
@pytest.mark.parametrize("when", ["while writing", "before a renaming"])
def test_nothing_is_overwritten_however_late_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, has_older: bool
) -> None:
    final, manifest = storage_path(tmp_path / "5"), Manifest(5, ("model",), {})
    if has_older:
        finish_writing(begin_writing(final, "older", 5), final, manifest)
    writing = begin_writing(final, "newer", 5)

    def appear() -> None:
        """Another program takes the place, and whatever was there is gone."""
        final.remove()
        internevo(final.local, 5)

    rename_to, has_come = StoragePath.rename_to, []

    def late(self: StoragePath, other: StoragePath) -> None:
        if not has_come:
            has_come.append(True)
            appear()
        rename_to(self, other)

    if when == "while writing":
        appear()
    else:
        monkeypatch.setattr(StoragePath, "rename_to", late)
    with pytest.raises((CheckpointError, StorageError), match=r"5'.*(move|empty it, or choose another)"):
        finish_writing(writing, final, manifest)
    assert (tmp_path / "5" / "model_tp0_pp0.pt").read_text() == "weights"


# -- object stores -----------------------------------------------------------------------------------------------------


def test_in_an_object_store_a_killed_save_is_ours_and_other_objects_are_not(trainer: Any) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    manager = CheckpointManager(url)
    final = storage_path(url) / "2"
    (final / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="2' has no manifest of a complete checkpoint"):
        manager.check_room(trainer.context, 1, 10)
    manager.save(trainer)
    assert [result.error is None for result in manager.poll()] == [False]
    assert final.names() == ["notes.txt"]
    (final / "notes.txt").remove()
    begin_writing(final, "killed", 2)
    (final / "__0_0.distcp").write_text("a part")
    manager.check_room(trainer.context, 1, 10)
    for _ in range(2):
        manager.save(trainer)
        manager.finish()
    assert why_not_replaceable(final, 2) is None
    assert steps_in(url) == [2]
    assert save_folder.UNFINISHED not in final.names()


def test_a_replacement_that_is_killed_at_any_instant_leaves_what_the_next_save_may_replace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    final = storage_path(f"memory://{uuid.uuid4().hex}") / "5"
    for killed_at in range(4):
        writing = begin_writing(final, "older", 5)
        (writing / "__0_0.distcp").write_text("a part")
        finish_writing(writing, final, Manifest(5, ("model",), {}))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(StoragePath, "remove", killed_after(killed_at, StoragePath.remove))
            begin_writing(final, "newer", 5)
            raise KeyboardInterrupt
        assert why_not_replaceable(final, 5) is None, killed_at


def killed_after(count: int, remove: Callable[[StoragePath], None]) -> Callable[[StoragePath], None]:
    calls = iter(range(count))

    def until(self: StoragePath) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        remove(self)

    return until
