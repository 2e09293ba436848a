"""Where checkpoints lie and when one counts: one folder a step, complete from one instant to the next.

<save>/<step>/                      tensors (torch.distributed.checkpoint), context.json, config.json, config_file.py
<save>/<step>/<step>.step           the manifest: what the checkpoint holds, and size and checksum of every file
<snapshots>/0/<step>.step           the same for a snapshot, whose folder is one of two that alternate
<save>/.writing-<name>-<id>         a save in progress, or what is left of one that was killed

<save>/<step>/.unfinished           the same in an object store, which cannot rename

The manifest is written last. On a local disk a folder also gets its final name only when everything in it is on disk.
An object store has no folders; there, what has no manifest does not count.

A save replaces only what a save of ours has left: a checkpoint with a readable manifest, or an unfinished one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field

from internlm.checkpoint.dcp_storage import FileChecksum, file_checksum
from internlm.checkpoint.internevo import is_internevo, refuse_internevo
from internlm.utils.errors import CheckpointError, StorageError
from internlm.utils.json_text import json_object
from internlm.utils.storage import StoragePath

FORMAT = 1
WHOLE_RUN = ("model", "optimizer", "scheduler", "sampler")
MANIFEST_SUFFIX = ".step"
WRITING_PREFIX = ".writing-"
REPLACED_PREFIX = ".replaced-"
REMOVING_PREFIX = ".removing-"
UNFINISHED = ".unfinished"
SNAPSHOT_SLOTS = ("0", "1")


@dataclass(frozen=True)
class Manifest:
    """What the manifest of a complete checkpoint says.

    Attributes:
        step: at which it was saved.
        contents: of `WHOLE_RUN`, what it holds.
        files: name (with folders, below the checkpoint) -> size and checksum.
        saved_at: seconds since 1970, by the clock of the main rank.
    """

    step: int
    contents: tuple[str, ...]
    files: dict[str, FileChecksum]
    saved_at: float = field(default_factory=time.time, compare=False)

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.step}{MANIFEST_SUFFIX}"

    def text(self) -> str:
        """Content of its file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


@dataclass(frozen=True)
class FoundCheckpoint:
    """A complete checkpoint."""

    path: StoragePath
    step: int
    is_snapshot: bool = False


def read_manifest(path: StoragePath) -> Manifest | None:
    """The manifest of a checkpoint; None when it has none, as the save did not finish.

    Raises:
        CheckpointError: the manifest is damaged, or of a later version.
        StorageError: the storage cannot be read.
    """
    name = _manifest_name(path)
    if name is None:
        return None
    try:
        values = json_object((path / name).read_text())
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"'{path}' has checkpoint format {values['format']}, and this version reads {FORMAT}: use the version "
                f"of internlm that wrote it"
            )
        files = {name: FileChecksum(**values) for name, values in values["files"].items()}
        return Manifest(int(values["step"]), tuple(values["contents"]), files, float(values["saved_at"]))
    except StorageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_internevo(path)
        raise CheckpointError(
            f"the manifest '{path / name}' is damaged ({type(error).__name__}: {error}): use another step"
        ) from error


def _manifest_name(path: StoragePath) -> str | None:
    """A folder named by a step has that step's manifest, any other (a snapshot) that of any."""
    manifests = [
        name for name in path.names() if name.endswith(MANIFEST_SUFFIX) and name.removesuffix(MANIFEST_SUFFIX).isdigit()
    ]
    own = f"{path.name}{MANIFEST_SUFFIX}"
    return own if own in manifests else next(iter(sorted(manifests)), None)


def find_checkpoints(save_folder: StoragePath, snapshot_folder: StoragePath | None = None) -> list[FoundCheckpoint]:
    """All complete checkpoints and snapshots, by step; a snapshot comes before a checkpoint of the same step."""
    found = []
    for name in save_folder.names():
        if name.isdigit() and f"{name}{MANIFEST_SUFFIX}" in (save_folder / name).names():
            found.append(FoundCheckpoint(save_folder / name, int(name)))
    snapshots = snapshot_folder or save_folder / "snapshot"
    for slot in SNAPSHOT_SLOTS:
        manifest = _manifest_name(snapshots / slot)
        if manifest is not None:
            found.append(
                FoundCheckpoint(snapshots / slot, int(manifest.removesuffix(MANIFEST_SUFFIX)), is_snapshot=True)
            )
    return sorted(found, key=lambda checkpoint: (checkpoint.step, not checkpoint.is_snapshot))


def resolve(path: StoragePath) -> StoragePath:
    """The checkpoint that a user means by `path`: a checkpoint itself, or the newest of a folder of them.

    Raises:
        CheckpointError: there is no complete checkpoint.
        StorageError: the storage cannot be read.
    """
    refuse_internevo(path)
    if _manifest_name(path) is not None:
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
        f"there is no complete checkpoint in '{path}'; expected a folder named by its step, such as 100/"
    )


def check_contents(path: StoragePath, manifest: Manifest, wanted: Collection[str]) -> None:
    """Raise CheckpointError if the checkpoint lacks a part of what is to be loaded from it."""
    absent = set(wanted) - set(manifest.contents)
    if absent:
        raise CheckpointError(
            f"the checkpoint '{path}' holds only {', '.join(manifest.contents)}, not {', '.join(sorted(absent))}: "
            f"set the content of what you load to {manifest.contents}"
        )


def find_damage(path: StoragePath, manifest: Manifest, share: int = 0, num_shares: int = 1) -> list[str]:
    """Compare the files of a checkpoint with its manifest.

    Args:
        path: the checkpoint.
        manifest: its manifest.
        share, num_shares: look at every `num_shares`-th file only, beginning at number `share`.

    Returns:
        One line for each file that is missing or is not what was written.
    """
    return list(_damage(path, manifest, share, num_shares))


def _damage(path: StoragePath, manifest: Manifest, share: int, num_shares: int) -> Iterator[str]:
    # Large files first, so that the shares are alike.
    by_size = sorted(manifest.files.items(), key=lambda item: (-item[1].size, item[0]))
    for name, expected in by_size[share::num_shares]:
        try:
            if not (path / name).exists():
                yield f"{name} is missing"
                continue
            found = file_checksum(path / name)
        except StorageError as error:
            yield f"{name} cannot be read: {error}"
            continue
        if found.size != expected.size:
            yield f"{name} has {found.size:,} bytes, {expected.size:,} were written"
        elif found != expected:
            yield f"{name} is not what was written: its checksum is {found.xxh3}, and was {expected.xxh3}"


# -- what a save may replace ------------------------------------------------------------------------------------------


def why_not_ours(path: StoragePath, step: int | None) -> str | None:
    """Why a save must not replace what is at `path`; None where nothing is, or what a save of ours has left.

    Args:
        path: where a checkpoint is to be.
        step: its step; None for a snapshot, whose folder may hold any.

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
        return "has the manifest of a checkpoint, and it cannot be read"
    if manifest is None:
        return "has no manifest of a complete checkpoint"
    if step is not None and manifest.step != step:
        return f"holds the checkpoint of step {manifest.step}"
    return None


def check_replaceable(path: StoragePath, step: int | None) -> None:
    """Raise CheckpointError if a save to `path` would destroy what this program has not written; see `why_not_ours`."""
    reason = why_not_ours(path, step)
    if reason is not None:
        raise CheckpointError(
            f"'{path}' {reason}: it is not replaced; move it away, or save to another folder (ckpt.save_ckpt_folder)"
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def begin_writing(final: StoragePath, save_id: str, step: int | None) -> StoragePath:
    """Make room for the checkpoint `final`, and return the folder to write it into.

    Leftovers of killed saves are removed. In an object store a checkpoint that is replaced stops to count here.

    Args:
        final: where the checkpoint will be found.
        save_id: different for every save.
        step: of the checkpoint; None for a snapshot.

    Raises:
        CheckpointError: something is there that no save of ours has left.
        StorageError: the storage cannot be written.
    """
    check_replaceable(final, step)
    parent = final.parent
    if not final.is_local:
        # First of all: were this killed, the rest would have no manifest, and yet be ours.
        (final / UNFINISHED).write_text(save_id)
        name = _manifest_name(final)
        if name is not None:
            (final / name).remove()
        for other in final.names():
            if other != UNFINISHED:
                (final / other).remove()
        return final
    put_back_replaced(parent)
    for name in parent.names():
        if name.startswith((WRITING_PREFIX, REMOVING_PREFIX)):
            (parent / name).remove()
    writing = parent / f"{WRITING_PREFIX}{final.name}-{save_id}"
    writing.make_folder()
    return writing


def finish_writing(writing: StoragePath, final: StoragePath, manifest: Manifest, *, is_snapshot: bool = False) -> None:
    """Make what was written the checkpoint `final`, replacing what was there.

    Raises:
        CheckpointError: something has appeared there that no save of ours has left.
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
        # Two folders cannot change their names in one instant: `put_back_replaced` mends what a kill leaves between.
        final.rename_to(replaced)
        if why_not_ours(replaced, step) is not None:
            # Another program was faster than this line.
            replaced.rename_to(final)
            check_replaceable(final, step)
    # Fails if a folder that is not empty has appeared meanwhile.
    writing.rename_to(final)
    replaced.remove()


def put_back_replaced(folder: StoragePath) -> None:
    """Give a checkpoint its name back that a killed save had taken away and not replaced; local folders only."""
    for name in folder.names():
        if name.startswith(REPLACED_PREFIX):
            final = folder / name.removeprefix(REPLACED_PREFIX)
            if final.exists():
                (folder / name).remove()
            else:
                (folder / name).rename_to(final)


def remove_checkpoint(path: StoragePath) -> None:
    """Remove a checkpoint so that at no instant a part of it counts."""
    if path.is_local:
        removing = path.parent / f"{REMOVING_PREFIX}{path.name}"
        path.rename_to(removing)
        removing.remove()
        return
    name = _manifest_name(path)
    if name is not None:
        (path / name).remove()
    path.remove()
