"""Where checkpoints lie and when one counts: one folder a step, complete from one instant to the next.

<save>/<step>/            tensors (torch.distributed.checkpoint), context.json, config.json, config_file.py
<save>/<step>/<step>.step written last, before the folder gets its name: the mark of a complete checkpoint
<save>/.writing-<step>    a save in progress, or what is left of one that was killed
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from internlm.utils.errors import CheckpointError

OLD_PREFIX = ".writing-old-"


def marker(folder: Path) -> Path:
    """The file that says that `folder` (named by its step) is complete."""
    return folder / f"{folder.name}.step"


def complete_steps(save_folder: Path) -> list[int]:
    """Steps of all complete checkpoints in a save folder, ascending; empty when the folder does not exist."""
    if not save_folder.is_dir():
        return []
    names = [path.name for path in save_folder.iterdir() if path.is_dir() and path.name.isdigit()]
    return sorted(int(name) for name in names if marker(save_folder / name).is_file())


def resolve(path: Path) -> Path:
    """The checkpoint folder that a user means by `path`: a checkpoint itself, or a save folder's newest.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    if marker(path).is_file():
        return path
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at '{path}': the path does not exist")
    steps = complete_steps(path)
    if steps:
        return path / str(steps[-1])
    if path.name.isdigit():
        raise CheckpointError(
            f"the checkpoint '{path}' is incomplete: its mark '{marker(path).name}' is missing, so its save did "
            f"not finish; use another step"
        )
    raise CheckpointError(
        f"there is no complete checkpoint in '{path}'; expected a folder named by its step, such as 100/"
    )


def begin_writing(save_folder: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; leftovers of earlier attempts are removed."""
    folder = save_folder / f".writing-{step}"
    finish_replacing(save_folder)
    for leftover in save_folder.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def finish_writing(writing: Path, step: int) -> Path:
    """Make what was written into the checkpoint of `step`, atomically; replaces an older one of the same step."""
    final = writing.parent / str(step)
    for path in writing.rglob("*"):
        if path.is_file():
            _sync(path)
    mark = writing / f"{step}.step"
    mark.touch()
    _sync(mark)
    _sync(writing)
    old = writing.parent / f"{OLD_PREFIX}{step}"
    if final.exists():
        # Two folders cannot change their names in one instant; `finish_replacing` mends what a kill leaves between.
        os.replace(final, old)
    os.replace(writing, final)
    shutil.rmtree(old, ignore_errors=True)
    _sync(writing.parent)
    return final


def finish_replacing(save_folder: Path) -> None:
    """Give a checkpoint its name that a save, killed while it replaced one of the same step, left without."""
    for old in save_folder.glob(f"{OLD_PREFIX}*"):
        step = old.name.removeprefix(OLD_PREFIX)
        if not (save_folder / step).exists():
            # The old one is moved away only when the new one is complete.
            new = save_folder / f".writing-{step}"
            os.replace(new if new.exists() else old, save_folder / step)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
