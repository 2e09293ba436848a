"""Finds the tokenized files of a train or validation folder, and the type of each file.

Owns the folder layout; opens no file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

_HINT = "Make tokenized files with tools/tokenizer.py"
_SIDECARS = (".meta", ".tokenizer.json")
"""Suffixes of the files that belong to a .bin file."""
_MAX_NAMES = 5

logger = get_logger(__name__)


@dataclass(frozen=True)
class TypedFile:
    """A .bin file and the index of its dataset type."""

    path: Path
    type_id: int


def find_train_files(folder: str | Path) -> tuple[list[TypedFile], list[str]]:
    """Find all `<folder>/<type>/**/*.bin`, and the names of the types.

    The types are the first-level subfolders in sorted order; a subfolder without a .bin keeps its type id. If the .bin
    files are directly in the folder, they form a single type named after it.

    Returns:
        (files in sorted order, type names by type id).

    Raises:
        DataError: the folder is missing, has no .bin file, or mixes the two layouts.
    """
    root = _existing(folder)
    direct = _sorted_bins(root, recursive=False)
    type_dirs = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [
        TypedFile(path, type_id)
        for type_id, directory in enumerate(type_dirs)
        for path in _sorted_bins(directory, recursive=True)
    ]
    if direct and files:
        raise DataError(
            f"{root}: {direct[0].name} is beside the type folder '{files[0].path.relative_to(root).parts[0]}': put "
            "every .bin into the subfolder of its type, or all of them directly into the folder"
        )
    if direct:
        return [TypedFile(path, 0) for path in direct], [root.resolve().name]
    if not files:
        raise DataError(f"{root}: no .bin file in this folder; expected {root}/<type>/NAME.bin. {_HINT}")
    return files, [directory.name for directory in type_dirs]


def find_valid_sets(folder: str | Path) -> dict[str, list[Path]]:
    """Find the validation sets: the directories with .bin files at or below `folder`.

    Returns:
        Path relative to `folder` -> .bin files, both sorted. .bin files directly in `folder` form a set named after it.

    Raises:
        DataError: the folder is missing or has no .bin file.
    """
    root = _existing(folder)
    sets: dict[str, list[Path]] = {}
    for path in _sorted_bins(root, recursive=True):
        relative = path.parent.relative_to(root).as_posix()
        sets.setdefault(root.resolve().name if relative == "." else relative, []).append(path)
    if not sets:
        raise DataError(f"{root}: no .bin file in this folder; expected {root}/<set>/NAME.bin. {_HINT}")
    return dict(sorted(sets.items()))


def unread_files(folder: str | Path) -> list[Path]:
    """Find files at or below `folder` that are not read, such as text, or a .meta without its .bin; sorted.

    Hidden files and folders are ignored.
    """
    unread = []
    for place, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        bins = {name for name in names if name.endswith(".bin")}
        known = bins | {name + suffix for name in bins for suffix in _SIDECARS}
        unread += [Path(place, name) for name in names if name not in known and not name.startswith(".")]
    return sorted(unread)


def log_unread_files(folder: str | Path) -> None:
    """Log one line that names the files of `folder` that are not read, if there are any."""
    if unread := unread_files(folder):
        names = ", ".join(str(path.relative_to(folder)) for path in unread[:_MAX_NAMES])
        more = f" and {len(unread) - _MAX_NAMES:,} more" if len(unread) > _MAX_NAMES else ""
        logger.info("%s: ignoring files that do not belong to a .bin file: %s%s", folder, names, more)


def _existing(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. {_HINT}, or set the folder to None")
    return root


def _sorted_bins(directory: Path, recursive: bool) -> list[Path]:
    if not recursive:
        return sorted(path for path in directory.glob("*.bin") if path.is_file())
    # Not rglob, which does not follow links: large data is often linked into a folder.
    walk = os.walk(directory, followlinks=True)
    return sorted(Path(folder, name) for folder, _, names in walk for name in names if name.endswith(".bin"))
