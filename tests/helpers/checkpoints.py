"""What lies in a folder of checkpoints, read without the code that is tested."""

from __future__ import annotations

import json
from pathlib import Path


def complete_steps(save_folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a save folder, ascending."""
    return sorted(int(path.name) for path in _folders(save_folder) if path.name.isdigit() and step_of(path) is not None)


def step_of(checkpoint: Path) -> int | None:
    """The step of a complete checkpoint or snapshot, whose files have the sizes in its manifest; None for any other
    folder."""
    for manifest in checkpoint.glob("*.step"):
        files = json.loads(manifest.read_text())["files"]
        paths = {checkpoint / name: entry["size"] for name, entry in files.items()}
        if all(path.is_file() and path.stat().st_size == size for path, size in paths.items()):
            return int(manifest.stem)
    return None


def leftovers(folder: Path) -> list[str]:
    """Names of what saves made for a while only."""
    return sorted(path.name for path in folder.glob(".*")) if folder.is_dir() else []


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
