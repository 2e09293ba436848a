"""Where a run will save, and what lies there that no save of ours has left."""

from __future__ import annotations

import re
from collections.abc import Iterator

from internlm.checkpoint.folder import SNAPSHOT_SLOTS, why_not_ours
from internlm.utils.storage import StoragePath


def in_the_way(
    save_folder: StoragePath, snapshot_folder: StoragePath | None, first: int, last: int, *, exports: bool
) -> list[str]:
    """What a run would destroy, one line each.

    Args:
        save_folder: of its checkpoints.
        snapshot_folder: of its snapshots; None: it takes none.
        first, last: its steps, any of which may be saved.
        exports: whether it writes `<step>_hf/` beside each checkpoint.

    Raises:
        StorageError: a folder cannot be read.
    """
    return list(_lines(save_folder, snapshot_folder, range(first, last + 1), exports))


def _lines(save_folder: StoragePath, snapshot_folder: StoragePath | None, steps: range, exports: bool) -> Iterator[str]:
    names = save_folder.names()
    reasons = {
        int(name): why_not_ours(save_folder / name, int(name))
        for name in names
        if name.isdigit() and str(int(name)) == name and int(name) in steps
    }
    for step, reason in sorted(reasons.items()):
        if reason is not None:
            yield f"'{save_folder / str(step)}' {reason}"
    for slot in SNAPSHOT_SLOTS if snapshot_folder is not None else ():
        assert snapshot_folder is not None
        reason = why_not_ours(snapshot_folder / slot, None)
        if reason is not None:
            yield f"'{snapshot_folder / slot}' {reason}"
    for name in names if exports else ():
        match = re.fullmatch(r"(\d+)_hf", name)
        if match is None or int(match[1]) not in steps:
            continue
        # An export has nothing that says who wrote it; ours lies beside a checkpoint of ours.
        if reasons.get(int(match[1]), "is not there") is not None:
            yield f"'{save_folder / name}' is an export, and its checkpoint is not there"
