"""The layout of save folders: where checkpoints are, when one is complete, and what a save may replace.

<save>/<step>/                      tensors (torch.distributed.checkpoint), context.json, config.json, config_file.py
<save>/<step>/<step>.step           the manifest, see `internlm.checkpoint.manifest`
<snapshots>/0/<step>.step           the same for a snapshot, in one of two alternating folders
<save>/.writing-<name>-<id>         a save in progress, or the leftover of a killed one

<save>/<step>/.unfinished           the same in an object store, which cannot rename

The manifest is written last. On a local disk, a folder gets its final name only after all its files are on disk.
An object store has no folders; there, only the manifest makes a checkpoint complete.

A save replaces only what an earlier save wrote: a checkpoint with a readable manifest, or an unfinished checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from internlm.checkpoint.internevo import is_internevo, refuse_internevo
from internlm.checkpoint.manifest import MANIFEST_SUFFIX, Manifest, manifest_name, read_manifest
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import StoragePath

WRITING_PREFIX = ".writing-"
REPLACED_PREFIX = ".replaced-"
REMOVING_PREFIX = ".removing-"
UNFINISHED = ".unfinished"
SNAPSHOT_SLOTS = ("0", "1")


@dataclass(frozen=True)
class FoundCheckpoint:
    """A complete checkpoint."""

    path: StoragePath
    step: int
    is_snapshot: bool = False


def find_checkpoints(save_folder: StoragePath, snapshot_folder: StoragePath | None = None) -> list[FoundCheckpoint]:
    """All complete checkpoints and snapshots, by step; a snapshot comes before a checkpoint of the same step."""
    found = []
    for name in save_folder.names():
        if name.isdigit() and f"{name}{MANIFEST_SUFFIX}" in (save_folder / name).names():
            found.append(FoundCheckpoint(save_folder / name, int(name)))
    snapshots = snapshot_folder or save_folder / "snapshot"
    for slot in SNAPSHOT_SLOTS:
        manifest = manifest_name(snapshots / slot)
        if manifest is not None:
            found.append(
                FoundCheckpoint(snapshots / slot, int(manifest.removesuffix(MANIFEST_SUFFIX)), is_snapshot=True)
            )
    return sorted(found, key=lambda checkpoint: (checkpoint.step, not checkpoint.is_snapshot))


def oldest_slot(save_folder: StoragePath, snapshot_folder: StoragePath, step: int) -> StoragePath:
    """The folder of the older snapshot, which that of `step` replaces."""
    # A snapshot of a later step belongs to another run or was refused on resuming, so it is replaced first.
    snapshots = {
        found.path.name: found.step
        for found in find_checkpoints(save_folder, snapshot_folder)
        if found.is_snapshot and found.step <= step
    }
    return snapshot_folder / min(SNAPSHOT_SLOTS, key=lambda slot: (snapshots.get(slot, -1), slot))


def resolve(path: StoragePath) -> StoragePath:
    """The checkpoint at `path`: the folder itself, or the newest complete one of a save folder.

    Raises:
        CheckpointError: there is no complete checkpoint.
        StorageError: the storage cannot be read.
    """
    refuse_internevo(path)
    if manifest_name(path) is not None:
        return path
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at '{path}': the path does not exist")
    found = find_checkpoints(path)
    if found:
        refuse_internevo(found[-1].path)
        return found[-1].path
    if path.name.isdigit():
        raise CheckpointError(
            f"the checkpoint '{path}' is incomplete: its manifest '{path.name}{MANIFEST_SUFFIX}' is missing, so its "
            f"save did not finish; use another step"
        )
    raise CheckpointError(
        f"there is no complete checkpoint in '{path}'; expected a folder named by its step, such as 100/{_inside(path)}"
    )


def _inside(path: StoragePath) -> str:
    """A hint at the save folders inside of a local folder, such as that of a run."""
    if not path.is_local:
        return ""
    found = [
        path / name for name in sorted(path.names()) if not (path / name).is_file() and find_checkpoints(path / name)
    ]
    return f"; there are some in {', '.join(f'{str(folder)!r}' for folder in found)}" if found else ""


# -- what a save may replace ------------------------------------------------------------------------------------------


def why_not_replaceable(path: StoragePath, step: int | None) -> str | None:
    """Why a save must not replace `path`; None if there is nothing, or an earlier save wrote it.

    Args:
        path: the folder of the checkpoint to be saved.
        step: its step; None for a snapshot, whose folder may hold any step.

    Raises:
        StorageError: the storage cannot be read.
    """
    if path.is_local and path.is_file():
        return "is a file"
    names = path.names()
    if not names or (UNFINISHED in names and not path.is_local):
        return None
    if is_internevo(path):
        return f"is a checkpoint of InternEvo (`internlm convert from-internevo --ckpt {path} --out DIR` converts it)"
    try:
        manifest = read_manifest(path)
    except CheckpointError:
        return "has a manifest that cannot be read"
    if manifest is None:
        return "has no manifest of a complete checkpoint"
    if step is not None and manifest.step != step:
        return f"holds the checkpoint of step {manifest.step}"
    return None


def check_replaceable(path: StoragePath, step: int | None) -> None:
    """Raise CheckpointError if `path` exists and no save wrote it; see `why_not_replaceable`."""
    reason = why_not_replaceable(path, step)
    if reason is not None:
        raise CheckpointError(
            f"'{path}' {reason}, so it is not replaced: move it away, or save to another folder (ckpt.save_ckpt_folder)"
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def begin_writing(final: StoragePath, save_id: str, step: int | None) -> StoragePath:
    """Prepare a save of the checkpoint `final`; returns the folder to write into.

    Removes the leftovers of killed saves. In an object store, this makes a replaced checkpoint incomplete.

    Args:
        final: folder of the complete checkpoint.
        save_id: unique for every save.
        step: step of the checkpoint; None for a snapshot.

    Raises:
        CheckpointError: `final` exists and was not written by a save.
        StorageError: the storage cannot be written.
    """
    check_replaceable(final, step)
    parent = final.parent
    if not final.is_local:
        # First: a folder without a manifest counts as an unfinished save only with this file.
        (final / UNFINISHED).write_text(save_id)
        name = manifest_name(final)
        if name is not None:
            (final / name).remove()
        for other in final.names():
            if other != UNFINISHED:
                (final / other).remove()
        return final
    restore_replaced(parent)
    for name in parent.names():
        if name.startswith((WRITING_PREFIX, REMOVING_PREFIX)):
            (parent / name).remove()
    writing = parent / f"{WRITING_PREFIX}{final.name}-{save_id}"
    writing.make_folder()
    return writing


def finish_writing(writing: StoragePath, final: StoragePath, manifest: Manifest, *, is_snapshot: bool = False) -> None:
    """Complete the checkpoint `final` from the folder `writing`, replacing an earlier one.

    Raises:
        CheckpointError: another program has created `final` meanwhile.
        StorageError: the storage cannot be written.
    """
    (writing / manifest.name).write_text(manifest.text())
    if not final.is_local:
        (final / UNFINISHED).remove()
        return
    step = None if is_snapshot else manifest.step
    replaced = final.parent / f"{REPLACED_PREFIX}{final.name}"
    if final.exists():
        check_replaceable(final, step)
        # Two renames are not atomic: `restore_replaced` repairs the state after a kill between them.
        final.rename_to(replaced)
        if why_not_replaceable(replaced, step) is not None:
            # Another program has replaced the folder since the check.
            replaced.rename_to(final)
            check_replaceable(final, step)
    # Fails if another program has created a non-empty folder meanwhile.
    writing.rename_to(final)
    replaced.remove()


def restore_replaced(folder: StoragePath) -> None:
    """Restore the name of a checkpoint that a killed save renamed but did not replace; local folders only."""
    for name in folder.names():
        if name.startswith(REPLACED_PREFIX):
            final = folder / name.removeprefix(REPLACED_PREFIX)
            if final.exists():
                (folder / name).remove()
            else:
                (folder / name).rename_to(final)


def remove_checkpoint(path: StoragePath) -> None:
    """Remove a checkpoint. It is complete or absent at every instant."""
    if path.is_local:
        removing = path.parent / f"{REMOVING_PREFIX}{path.name}"
        path.rename_to(removing)
        removing.remove()
        return
    name = manifest_name(path)
    if name is not None:
        (path / name).remove()
    path.remove()
