"""Which files of a folder are which subset and split, by the rules of Hugging Face `datasets`.

Owns the dataset card (the YAML of README.md), the patterns of split names, and folders of `Dataset.save_to_disk`.
Works on names relative to the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from internlm.utils.errors import DataError

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATORS = "[-._ 0-9]"
_SHARD = re.compile(r"data/(.+)-\d{5}-of-\d{5}.*\..*")
_STATE, _SPLITS = "state.json", "dataset_dict.json"

Splits = dict[str, list[str]]
"""Name of a split -> names of its files, in reading order."""


def card_subsets(folder: Path) -> dict[str, dict[str, Any]]:
    """The `configs` of a dataset card: name -> its entries; empty without a card.

    Raises:
        DataError: the card is not YAML, or a config has no name.
    """
    card = folder / "README.md"
    if not card.is_file():
        return {}
    lines = card.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff").splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    import yaml

    try:
        content = yaml.safe_load("\n".join(lines[1 : lines.index("---", 1)]))
    except yaml.YAMLError as error:
        raise DataError(f"{card}: the block between '---' lines is not YAML: {error}") from error
    configs = content.get("configs") if isinstance(content, dict) else None
    if not configs:
        return {}
    if not isinstance(configs, list) or not all(isinstance(each, dict) and "config_name" in each for each in configs):
        raise DataError(f"{card}: 'configs' is not a list of entries with 'config_name'; correct or remove it")
    return {str(each["config_name"]): each for each in configs}


def choose_subset(subsets: dict[str, dict[str, Any]], subset: str | None, folder: Path) -> str:
    """The subset to read: the given one, the only one, or the card's default.

    Raises:
        DataError: no such subset, or several without a default.
    """
    names = ", ".join(map(repr, subsets))
    if subset is not None:
        if subset not in subsets:
            raise DataError(
                f"{folder}: no subset '{subset}' in the configs of README.md; data.subset_name is one of {names}"
            )
        return subset
    defaults = [name for name, entry in subsets.items() if name == "default" or entry.get("default")]
    chosen = list(subsets) if len(subsets) == 1 else defaults
    if len(chosen) != 1:
        raise DataError(
            f"{folder}: {len(subsets)} subsets and no single default: set data.subset_name to one of {names}"
        )
    return chosen[0]


def card_splits(entry: dict[str, Any], names: Sequence[str], folder: Path) -> tuple[Splits, list[str]]:
    """The splits of a config of the card.

    Returns:
        (splits, patterns that no file matches).

    Raises:
        DataError: its data_files are malformed.
    """
    directory = str(entry.get("data_dir") or "").strip("/").removeprefix("./")
    base = f"{directory}/" if directory and directory != "." else ""
    if entry.get("data_files") is None:
        below = [name.removeprefix(base) for name in names if name.startswith(base)]
        return {split: [base + name for name in files] for split, files in default_splits(below).items()}, []
    splits: Splits = {}
    unmatched = []
    for split, patterns in _data_files(entry["data_files"], folder).items():
        chosen: list[str] = []
        for pattern in patterns:
            found = match(base + pattern.removeprefix("./"), names)
            unmatched += [] if found else [pattern]
            chosen += found
        splits[split] = list(dict.fromkeys(chosen))
    return splits, unmatched


def _data_files(value: Any, folder: Path) -> dict[str, list[str]]:
    """The patterns of each split."""
    entries = value if isinstance(value, list) else [value]
    if all(isinstance(entry, str) for entry in entries):
        return {"train": entries}
    splits = {}
    for entry in entries:
        patterns = entry.get("path") if isinstance(entry, dict) else None
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, list) or "split" not in entry:
            raise DataError(
                f"{folder / 'README.md'}: data_files has {entry!r}; expected names, or entries with 'split' and 'path'"
            )
        splits[str(entry["split"])] = [str(pattern) for pattern in patterns]
    return splits


def default_splits(names: Iterable[str]) -> Splits:
    """The splits of a folder without a card: by `data/<split>-00000-of-00002.*`, by folders, or by words in file names.

    Files of no split are the split "train" if no name has a word for a split; otherwise they belong to none.
    """
    names = list(names)
    shards: Splits = {}
    for name in names:
        if found := _SHARD.fullmatch(name):
            shards.setdefault(found[1], []).append(name)
    if shards:
        return shards
    for patterns in (
        ("**/{}/**", "**/{}[s]*/**", "**/*[s]{}/**", "**/*[s]{}[s]*/**"),
        ("**/{}[s]*", "**/*[s]{}[s]*"),
    ):
        splits = {
            split: list(
                dict.fromkeys(
                    name
                    for word in words
                    for pattern in patterns
                    for name in match(pattern.replace("[s]", _SEPARATORS).format(word), names)
                )
            )
            for split, words in SPLIT_WORDS.items()
        }
        splits = {split: files for split, files in splits.items() if files}
        if splits:
            return splits
    return {"train": names} if names else {}


def match(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that match a glob pattern, in the given order.

    `*` and `?` match within a folder, `**/` any number of folders, `**` at the end everything below, and `[...]` one
    character.
    """
    expression = re.compile(_expression(pattern))
    return [name for name in names if expression.fullmatch(name)]


def _expression(pattern: str) -> str:
    translated = ""
    for part in re.findall(r"\*\*/|\*+|\?|\[!?[^]]+\]|.", pattern, re.DOTALL):
        if part == "**/":
            translated += "(?:.*/)?"
        elif part.startswith("*"):
            translated += ".*" if part == "**" else "[^/]*"
        elif part == "?":
            translated += "[^/]"
        elif part.startswith("[") and len(part) > 1:
            inside = part[1:-1].replace("\\", "\\\\")
            translated += f"[{'^' + inside[1:] if inside.startswith('!') else inside}]"
        else:
            translated += re.escape(part)
    return translated


def saved_splits(folder: Path) -> Splits | None:
    """The splits of a folder of `save_to_disk`; None if it is no such folder.

    A single `Dataset` has the name of the split that it was loaded from, or else "train".

    Raises:
        DataError: one of its JSON files is damaged, or names a file that is missing.
    """
    if (folder / _SPLITS).is_file():
        splits = _read(folder / _SPLITS, "splits")
        return {str(split): _saved_files(folder, f"{split}/") for split in splits}
    if (folder / _STATE).is_file():
        split = _read(folder / _STATE, "_split")
        return {str(split or "train"): _saved_files(folder, "")}
    return None


def _saved_files(folder: Path, prefix: str) -> list[str]:
    state = folder / prefix / _STATE
    names = [f"{prefix}{entry['filename']}" for entry in _read(state, "_data_files")]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{state}: names {missing[0]}, which is missing; copy the folder again")
    return names


def _read(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not written by save_to_disk, or damaged: {error!r}; save the dataset again"
        ) from error


def missing_shards(names: Iterable[str]) -> list[str]:
    """Describe the sets of shards `NAME-00000-of-00002` that are incomplete."""
    present: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if found := re.fullmatch(r"(.*)-(\d{5,})-of-(\d{5,})\D.*", name):
            present.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    return [
        f"{prefix} has {len(numbers):,} of {total:,} shards"
        for (prefix, total), numbers in present.items()
        if len(numbers) < total
    ]
