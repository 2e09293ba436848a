"""Finds the files of rows of a folder: one as downloaded from Hugging Face, of `save_to_disk`, or with type subfolders.

Owns which files are taken and the line of the log that names them; opens no file of rows.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm.data.documents.document_file import TypedFile
from internlm.data.documents.found_kinds import describe_found, identify
from internlm.data.remote.mirror import local_folder
from internlm.data.rows.dataset_layout import (
    SPLIT_WORDS,
    Splits,
    card_splits,
    card_subsets,
    choose_subset,
    default_splits,
    missing_shards,
    saved_splits,
)
from internlm.data.rows.open_rows import READABLE, row_format
from internlm.data.tokenize.input_files import name_some
from internlm.utils.errors import DataError, nearest
from internlm.utils.logging import get_logger

_METADATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_FAMILIES = {"jsonl": "json"}
"""Formats that `datasets` reads as one; others are not mixed."""
_PREFERRED = ("txt", "json", "arrow", "parquet")
"""In ascending order, when there are as many files of two formats."""

logger = get_logger(__name__)


@dataclass(frozen=True)
class RowFiles:
    """The files of a split.

    Attributes:
        files: in reading order.
        types: type names by type id.
        ignored: files of the folder that are not read, without metadata and hidden ones.
    """

    files: list[TypedFile]
    types: list[str]
    ignored: list[Path]


def find_row_files(folder: str | Path, subset: str | None = None, split: str = "train") -> RowFiles:
    """Find the files of a split of a folder, and log which are taken.

    The splits are, in this order: those of `save_to_disk`; the `configs` in the YAML of README.md; those that names of
    files and folders tell, as `datasets` finds them. A folder without any is the split "train". Of several formats, the
    one with most files of a type is read. If all files are in subfolders, `<type>/**`, these are their types;
    otherwise all files have one type, named after the subset or the folder.

    Args:
        folder: the folder, or a single file; or the URL of one, see `local_folder`.
        subset: a config of README.md, or else a subfolder; None: the only or default one.
        split: "train", "validation", "test", or another one that names or README.md tell.

    Raises:
        DataError: no such folder, subset or split, no file of a known format, or several subsets without a default.
    """
    root = Path(local_folder(folder))
    if root.is_file():
        found = identify(root)
        if found is not None and found.type != "streaming":
            raise DataError(f"{root}: {found.what}, not a file of rows ({READABLE}); {found.advice}")
        return RowFiles([TypedFile(root, 0)], [root.name], [])
    if not root.is_dir():
        raise DataError(f"{root}: no such file or folder")
    subsets = card_subsets(root)
    if subset is not None and not subsets:
        root = _subfolder(root, subset)
    names = _names_below(root)
    splits = saved_splits(root)
    unmatched: list[str] = []
    label = root.resolve().name
    if splits is None and subsets:
        name = choose_subset(subsets, subset, root)
        splits, unmatched = card_splits(subsets[name], [name for name in names if _is_data(name)], root)
        label = name if len(subsets) > 1 else label
    elif splits is None:
        splits = default_splits(name for name in names if _is_data(name))
    candidates = _files_of(splits, split, root, names, unmatched)
    types, type_ids = _types(root, candidates, label, has_card=bool(subsets))
    taken = _of_one_format(type_ids)
    ignored = [root / name for name in names if name not in taken and name.rsplit("/", 1)[-1] not in _METADATA]
    files = [name for name in candidates if name in taken]
    _log(root, split, files, [name for name in candidates if name not in taken], ignored, unmatched)
    return RowFiles([TypedFile(root / name, type_ids[name]) for name in files], types, ignored)


def _subfolder(root: Path, subset: str) -> Path:
    if (root / subset).is_dir():
        return root / subset
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    raise DataError(
        f"{root}: no subset '{subset}': README.md has no configs, and no subfolder has this name; "
        f"the subfolders are {folders}.{nearest(subset, folders)}"
    )


def _names_below(root: Path) -> list[str]:
    """Names of all files at or below a folder, sorted as text; without hidden ones and folders named `__...`."""
    found = []
    seen = set()
    for place, subfolders, files in os.walk(root, followlinks=True):
        # A link to a folder above it would be followed forever.
        if os.path.realpath(place) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(place))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")))
        found += [Path(place, name).relative_to(root).as_posix() for name in files if not name.startswith(".")]
    return sorted(found)


def _is_data(name: str) -> bool:
    return row_format(name) is not None and name.rsplit("/", 1)[-1] not in _METADATA


def _files_of(splits: Splits, split: str, root: Path, names: Sequence[str], unmatched: Sequence[str]) -> list[str]:
    splits = {name: [file for file in files if row_format(file)] for name, files in splits.items()}
    splits = {name: files for name, files in splits.items() if files}
    if not splits:
        if unmatched:
            raise DataError(
                f"{root}: no file matches {', '.join(map(repr, unmatched))}, which README.md names for this subset: "
                "download the dataset again, completely"
            )
        content = f"it has {name_some(map(Path, names))}" if names else "it is empty"
        hint = describe_found(root, but="streaming")
        raise DataError(f"{root}: no file of rows ({READABLE}); {content}" + (f". {hint}" if hint else ""))
    canonical = next((name for name, words in SPLIT_WORDS.items() if split in words), split)
    chosen = splits.get(split) or splits.get(canonical)
    if chosen is None:
        there = ", ".join(f"'{name}' ({len(files):,} files)" for name, files in splits.items())
        raise DataError(f"{root}: no split '{split}'; the folder has {there}")
    return chosen


def _of_one_format(type_ids: dict[str, int]) -> set[str]:
    """The files of each type that have its most frequent format."""
    counts = Counter((type_id, _family(name)) for name, type_id in type_ids.items())
    best: dict[int, str] = {}
    for type_id, family in sorted(counts, key=lambda key: (counts[key], _PREFERRED.index(key[1]))):
        best[type_id] = family
    return {name for name, type_id in type_ids.items() if _family(name) == best[type_id]}


def _family(name: str) -> str:
    format = row_format(name)
    assert format is not None
    return _FAMILIES.get(format, format)


def _types(root: Path, names: Sequence[str], label: str, *, has_card: bool) -> tuple[list[str], dict[str, int]]:
    """(names of the types, type id of each file)."""
    folders = {name.split("/", 1)[0] for name in names if "/" in name}
    is_layout = "data" in folders or any(_has_split_word(folder) for folder in folders)
    if has_card or is_layout or not folders or any("/" not in name for name in names):
        return [label], dict.fromkeys(names, 0)
    # A subfolder without files keeps its type id, as in folders of tokenized files.
    types = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    return types, {name: types.index(name.split("/", 1)[0]) for name in names}


def _has_split_word(folder: str) -> bool:
    words = set(re.split(r"[-._ 0-9]", folder))
    return any(word in words for names in SPLIT_WORDS.values() for word in names)


def _log(
    root: Path,
    split: str,
    chosen: Sequence[str],
    other_formats: Sequence[str],
    ignored: Sequence[Path],
    unmatched: Sequence[str],
) -> None:
    others = f"; ignoring {len(ignored):,} other files: {name_some(ignored, root)}" if ignored else ""
    formats = " and ".join(sorted(set(map(_family, chosen))))
    logger.info(
        "%s: split '%s' is %d %s file%s: %s%s", root, split, len(chosen), formats,
        "s" if len(chosen) > 1 else "", name_some(map(Path, chosen)), others,
    )  # fmt: skip
    if other_formats:
        logger.warning(
            "%s: split '%s' also has files of other formats, which are not read: %s. If they have other rows, put each "
            "format into a subfolder", root, split, name_some(map(Path, other_formats)),
        )  # fmt: skip
    problems = [*missing_shards(chosen), *(f"no file matches '{pattern}' of README.md" for pattern in unmatched)]
    if problems:
        logger.warning("%s: the download is incomplete, and what is missing is not read: %s", root, "; ".join(problems))
