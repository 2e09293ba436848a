"""Finds the files of documents of a train or validation folder, and the type of each file.

Owns the folder layout; opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from internlm.data.documents.document_file import FileFormat, TypedFile
from internlm.data.documents.found_kinds import describe_found
from internlm.data.documents.index_cache import CACHE_FOLDER
from internlm.utils.errors import DataError, nearest
from internlm.utils.folder_walk import walk_links
from internlm.utils.logging import get_logger

_MAX_NAMES = 5

logger = get_logger(__name__)


def find_train_files(folder: str | Path, format: FileFormat) -> tuple[list[TypedFile], list[str]]:
    """Find all `<folder>/<type>/**/NAME` of a format, and the names of the types.

    The types are the first-level subfolders in sorted order; a subfolder without such a file keeps its type id. If
    the files are directly in the folder, they form a single type named after it. `folder` may also be one file, or its
    path without the suffix (Megatron's prefix), whose type is named after it.

    Returns:
        (files in sorted order, type names by type id).

    Raises:
        DataError: the folder is missing, has no such file, or mixes the two layouts.
    """
    if alone := _single_file(folder, format):
        return [TypedFile(alone, 0)], [alone.stem]
    root, suffix = _existing(folder, format), _suffixes(format)
    direct = _sorted_files(root, format, recursive=False)
    type_dirs = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = [
        TypedFile(path, type_id)
        for type_id, directory in enumerate(type_dirs)
        for path in _sorted_files(directory, format, recursive=True)
    ]
    if direct and files:
        raise DataError(
            f"{root}: {direct[0].name} is beside the type folder '{files[0].path.relative_to(root).parts[0]}': put "
            f"every {suffix} into the subfolder of its type, or all of them directly into the folder"
        )
    if direct:
        return [TypedFile(path, 0) for path in direct], [root.resolve().name]
    if not files:
        raise DataError(
            f"{root}: no {suffix} file in this folder; expected {root}/<type>/NAME{suffix}. {_hint(root, format)}"
        )
    return files, [directory.name for directory in type_dirs]


def find_valid_sets(folder: str | Path, format: FileFormat) -> dict[str, list[Path]]:
    """Find the validation sets: the directories with files of a format at or below `folder`.

    Returns:
        Path relative to `folder` -> files, both sorted. Files directly in `folder` form a set named after it; `folder`
        may also be one file, see `find_train_files`.

    Raises:
        DataError: the folder is missing or has no such file.
    """
    if alone := _single_file(folder, format):
        return {alone.stem: [alone]}
    root = _existing(folder, format)
    sets: dict[str, list[Path]] = {}
    for path in _sorted_files(root, format, recursive=True):
        relative = path.parent.relative_to(root).as_posix()
        sets.setdefault(root.resolve().name if relative == "." else relative, []).append(path)
    if not sets:
        suffix = _suffixes(format)
        raise DataError(
            f"{root}: no {suffix} file in this folder; expected {root}/<set>/NAME{suffix}. {_hint(root, format)}"
        )
    return dict(sorted(sets.items()))


def min_length_of_type(
    type_name: str, folder: str | Path, type_names: list[str], min_length: int, by_type: Mapping[str, int] | None
) -> int:
    """The minimum length of the documents of a type.

    Raises:
        DataError: `by_type` names an unknown type.
    """
    for name in by_type or {}:
        if name not in type_names:
            raise DataError(
                f"min_length_dict names the type '{name}', but {folder} has {type_names}." + nearest(name, type_names)
            )
    return (by_type or {}).get(type_name, min_length)


def unread_files(folder: str | Path, format: FileFormat) -> list[Path]:
    """Find files at or below `folder` that are not read, such as text; sorted.

    Hidden files and folders are ignored.
    """
    unread = []
    for place, subfolders, names in walk_links(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        read = {name for name in names if name.endswith(format.suffixes)}
        known = read | {other for name in read for other in format.companions(name)}
        unread += [Path(place, name) for name in names if name not in known and not name.startswith(".")]
    return sorted(unread)


def log_unread_files(folder: str | Path, format: FileFormat) -> None:
    """Log one line that names the files of `folder` that are not read, if there are any."""
    if unread := unread_files(folder, format):
        names = ", ".join(str(path.relative_to(folder)) for path in unread[:_MAX_NAMES])
        more = f" and {len(unread) - _MAX_NAMES:,} more" if len(unread) > _MAX_NAMES else ""
        logger.info("%s: ignoring files that do not belong to a %s file: %s%s", folder, _suffixes(format), names, more)


def _suffixes(format: FileFormat) -> str:
    return " or ".join(format.suffixes)


def _hint(path: Path, format: FileFormat) -> str:
    """What is there instead of a format, or else how to make its files."""
    return describe_found(path, but=format.name) or format.hint


def _single_file(path: str | Path, format: FileFormat) -> Path | None:
    """The file that `path` names, with or without its suffix; None for a folder, or if there is none.

    Raises:
        DataError: it is a file, but not of the format.
    """
    path = Path(path)
    if path.is_dir():
        return None
    if path.is_file() and not path.name.endswith(format.suffixes):
        raise DataError(f"{path}: not a {_suffixes(format)} file (data.type = '{format.name}'). {_hint(path, format)}")
    names = [path.name, *(path.name + suffix for suffix in format.suffixes)]
    return next((each for each in map(path.with_name, names) if path.name and each.is_file()), None)


def _existing(folder: str | Path, format: FileFormat) -> Path:
    root = Path(folder)
    if not root.is_dir():
        text = str(folder)
        if len(text.split()) > 1:
            raise DataError(
                f"{text!r} is neither a folder nor a file: one path is expected, not Megatron's list of weights and "
                "prefixes; give each prefix with its weight in data.blend"
            )
        raise DataError(f"{root}: no such folder. {format.hint}, or set the folder to None")
    return root


def _sorted_files(directory: Path, format: FileFormat, recursive: bool) -> list[Path]:
    if not recursive:
        return sorted(path for path in directory.iterdir() if path.name.endswith(format.suffixes) and path.is_file())
    # Not rglob, which does not follow links: large data is often linked into a folder.
    files = []
    for folder, subfolders, names in walk_links(directory):
        # The cache has .npy files of its own.
        subfolders[:] = [name for name in subfolders if name != CACHE_FOLDER]
        files += [Path(folder, name) for name in names if name.endswith(format.suffixes)]
    return sorted(files)
