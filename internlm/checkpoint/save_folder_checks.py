"""Checks before the first step of a run: its folders are writable, and saves overwrite nothing but checkpoints."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence

from internlm.checkpoint.reading import listed
from internlm.checkpoint.save_folder import SNAPSHOT_SLOTS, WRITING_PREFIX, why_not_replaceable
from internlm.core.communication.objects import from_main_rank, of_all_ranks
from internlm.core.context.parallel_context import ParallelContext
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import StoragePath


def check_writable(folders: Sequence[StoragePath], context: ParallelContext) -> None:
    """Write a file into each of the folders and remove it, once per machine; collective.

    Raises:
        CheckpointError: a machine of the job cannot write.
    """
    failure = None
    local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or context.rank
    if int(local_rank) == 0:
        for folder in folders:
            try:
                folder.make_folder()
                # Named like the leftover of a killed save, so that the next save removes it after a kill here.
                ping = folder / f"{WRITING_PREFIX}ping-{socket.gethostname()}"
                ping.write_text("ping")
                ping.remove()
            except OSError as error:
                failure = f"checkpoints cannot be saved to '{folder}': {error}"
                break
    for found in of_all_ranks(context, failure):
        if found is not None:
            raise CheckpointError(found)


def check_overwrites(
    save_folder: StoragePath,
    snapshot_folder: StoragePath | None,
    first: int,
    last: int,
    context: ParallelContext,
    *,
    exports: bool,
) -> None:
    """Refuse a run whose saves would overwrite anything but checkpoints; collective.

    Args:
        save_folder: the run's folder of checkpoints.
        snapshot_folder: its folder of snapshots; None for a run without snapshots.
        first: first step that may be saved.
        last: last step that may be saved.
        context: where this rank stands.
        exports: whether the run writes `<step>_hf/` beside each checkpoint.

    Raises:
        CheckpointError: a folder of a checkpoint, a snapshot or an export would be overwritten.
    """

    def look() -> list[str]:
        try:
            return overwritten_folders(save_folder, snapshot_folder, first, last, exports=exports)
        except OSError as error:
            return [str(error)]

    found = from_main_rank(context, look)
    if found:
        raise CheckpointError(
            f"this run saves its steps {first} to {last} in '{save_folder}', and would overwrite what it has not "
            f"written:{listed(found)}\nmove that away, or set ckpt.save_ckpt_folder to another folder; to start "
            f"from a checkpoint, name it in ckpt.load_ckpt_info (doc/checkpoints.md)"
        )


def overwritten_folders(
    save_folder: StoragePath, snapshot_folder: StoragePath | None, first: int, last: int, *, exports: bool
) -> list[str]:
    """Folders that the saves of a run would overwrite though no save wrote them, one line each.

    Args:
        save_folder: the run's folder of checkpoints.
        snapshot_folder: its folder of snapshots; None for a run without snapshots.
        first: first step that may be saved.
        last: last step that may be saved.
        exports: whether the run writes `<step>_hf/` beside each checkpoint.

    Raises:
        StorageError: a folder cannot be read.
    """
    return list(_lines(save_folder, snapshot_folder, range(first, last + 1), exports))


def _lines(save_folder: StoragePath, snapshot_folder: StoragePath | None, steps: range, exports: bool) -> Iterator[str]:
    names = save_folder.names()
    reasons = {
        int(name): why_not_replaceable(save_folder / name, int(name))
        for name in names
        if name.isdigit() and str(int(name)) == name and int(name) in steps
    }
    for step, reason in sorted(reasons.items()):
        if reason is not None:
            yield f"'{save_folder / str(step)}' {reason}"
    for slot in SNAPSHOT_SLOTS if snapshot_folder is not None else ():
        assert snapshot_folder is not None
        reason = why_not_replaceable(snapshot_folder / slot, None)
        if reason is not None:
            yield f"'{snapshot_folder / slot}' {reason}"
    for name in names if exports else ():
        match = re.fullmatch(r"(\d+)_hf", name)
        if match is None or int(match[1]) not in steps:
            continue
        # An export does not record which run wrote it; the checkpoint beside it does.
        if reasons.get(int(match[1]), "is not there") is not None:
            yield f"'{save_folder / name}' is an export, and its checkpoint is not there"
