"""Finds tokenized files in a train or valid folder and gives every file its type.

Owns the folder layout of the contract; opens no file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

_HOW_TO_MAKE = "Make tokenized files with tools/tokenizer.py"
_BESIDE = (".meta", ".tokenizer.json")
"""What belongs to a .bin file, by what is behind its name."""
_NAMED_FILES = 5

logger = get_logger(__name__)


@dataclass(frozen=True)
class TypedFile:
    """A .bin file and the index of its dataset type."""

    path: Path
    type_id: int


def find_train_files(folder: str | Path) -> tuple[list[TypedFile], list[str]]:
    """All `<folder>/<type>/**/*.bin` in sorted order, and the names of the types.

    First-level sub-directories, sorted, are the types; one without any .bin keeps its id. If .bin files lie directly
    in the folder, it is a single type named after the folder and may not also have sub-directories with .bin files.

    Raises:
        DataError: the folder is missing, holds no .bin, or mixes the two layouts.
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
            f"{root}: {direct[0].name} lies beside the type folder '{files[0].path.relative_to(root).parts[0]}': put "
            "every .bin into a sub-folder, one for each type, or all of them directly into the folder"
        )
    if direct:
        return [TypedFile(path, 0) for path in direct], [root.resolve().name]
    if not files:
        raise DataError(f"{root}: no .bin file in this folder; expected {root}/<type>/NAME.bin. {_HOW_TO_MAKE}")
    return files, [directory.name for directory in type_dirs]


def find_valid_sets(folder: str | Path) -> dict[str, list[Path]]:
    """Every directory at or below `folder` that holds .bin files, by its path relative to `folder`, sorted.

    .bin files directly in `folder` form the set named after the folder.

    Raises:
        DataError: the folder is missing or holds no .bin.
    """
    root = _existing(folder)
    sets: dict[str, list[Path]] = {}
    for path in _sorted_bins(root, recursive=True):
        relative = path.parent.relative_to(root).as_posix()
        sets.setdefault(root.resolve().name if relative == "." else relative, []).append(path)
    if not sets:
        raise DataError(f"{root}: no .bin file in this folder; expected {root}/<set>/NAME.bin. {_HOW_TO_MAKE}")
    return dict(sorted(sets.items()))


def unread_files(folder: str | Path) -> list[Path]:
    """Files at or below `folder` that no reader looks at, such as text, or a .meta without its .bin; sorted.

    Hidden files and folders do not count.
    """
    unread = []
    for place, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        bins = {name for name in names if name.endswith(".bin")}
        known = bins | {name + beside for name in bins for beside in _BESIDE}
        unread += [Path(place, name) for name in names if name not in known and not name.startswith(".")]
    return sorted(unread)


def log_unread_files(folder: str | Path) -> None:
    """One line of the log that names the files of `folder` that are left out, if there are any."""
    if unread := unread_files(folder):
        names = ", ".join(str(path.relative_to(folder)) for path in unread[:_NAMED_FILES])
        more = f" and {len(unread) - _NAMED_FILES:,} more" if len(unread) > _NAMED_FILES else ""
        logger.info("%s: files that are no .bin are left out: %s%s", folder, names, more)


def _existing(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. {_HOW_TO_MAKE}, or set the folder to None")
    return root


def _sorted_bins(directory: Path, recursive: bool) -> list[Path]:
    if not recursive:
        return sorted(path for path in directory.glob("*.bin") if path.is_file())
    # Not rglob, which does not follow links: large data is often linked into place.
    walk = os.walk(directory, followlinks=True)
    return sorted(Path(folder, name) for folder, _, names in walk for name in names if name.endswith(".bin"))
