"""Lists save folders, describes checkpoints and compares two of them; on any storage, without a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.internevo import is_internevo
from internlm.checkpoint.manifest import MANIFEST_SUFFIX, Manifest, read_manifest
from internlm.checkpoint.reading import CONFIG_FILE, CONTEXT_FILE, read_config_keys, read_context
from internlm.checkpoint.run_state import MODEL_PREFIX
from internlm.checkpoint.save_folder import REMOVING_PREFIX, REPLACED_PREFIX, SNAPSHOT_SLOTS, WRITING_PREFIX
from internlm.checkpoint.tensor_files import Entry, TensorReader
from internlm.utils.errors import CheckpointError
from internlm.utils.storage import StoragePath

_CONFIG_SECTIONS = ("model", "data", "adam")
"""Keys of `config.json` that are read here and whose values are objects."""

_CONTEXT_SECTIONS = ("state", "data", "scaler", "hooks")
"""Likewise for `context.json`."""

COMPARED_AT_ONCE = 2**24
"""Number of elements compared at a time."""


@dataclass(frozen=True)
class Listed:
    """One line of a listing.

    Attributes:
        name: name of the folder, relative to the listed one.
        path: the folder.
        kind: "checkpoint", "snapshot", "incomplete", "leftover" of a killed save, "export" or "InternEvo".
        manifest: manifest of a complete checkpoint or snapshot.
        num_bytes: size of all its files.
        context: content of `context.json`; empty without one.
        problem: description of a defect; empty if there is none.
    """

    name: str
    path: StoragePath
    kind: str
    manifest: Manifest | None = None
    num_bytes: int = 0
    context: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def step(self) -> int | None:
        """Step of a complete checkpoint, or of a folder that is named by one."""
        if self.manifest is not None:
            return self.manifest.step
        return int(self.path.name) if self.kind == "incomplete" and self.path.name.isdigit() else None


def list_checkpoints(folder: StoragePath, snapshot_folder: StoragePath | None = None) -> list[Listed]:
    """All checkpoints in a save folder, complete or not, by step; folders without a step come last.

    Args:
        folder: a save folder, a folder of snapshots, or a checkpoint.
        snapshot_folder: None: `<folder>/snapshot`.
    """
    if _has_manifest(folder) or is_internevo(folder):
        return [_examine(folder, str(folder), is_snapshot=False)]
    found = []
    for name in folder.names():
        path = folder / name
        if name.isdigit():
            # In a folder of snapshots, names are slots and not steps.
            is_snapshot = (
                name in SNAPSHOT_SLOTS and _has_manifest(path) and f"{name}{MANIFEST_SUFFIX}" not in path.names()
            )
            found.append(_examine(path, name, is_snapshot))
        elif name.startswith((WRITING_PREFIX, REPLACED_PREFIX, REMOVING_PREFIX)):
            found.append(Listed(name, path, "leftover", num_bytes=tree_size(path)))
        elif re.fullmatch(r"\d+_hf", name):
            found.append(Listed(name, path, "export", num_bytes=tree_size(path)))
    snapshots = snapshot_folder or folder / "snapshot"
    shown = f"{snapshots}/" if snapshot_folder else "snapshot/"
    for name in snapshots.names():
        if name in SNAPSHOT_SLOTS:
            found.append(_examine(snapshots / name, f"{shown}{name}", is_snapshot=True))
        elif name.startswith((WRITING_PREFIX, REPLACED_PREFIX, REMOVING_PREFIX)):
            path = snapshots / name
            found.append(Listed(f"{shown}{name}", path, "leftover", num_bytes=tree_size(path)))
    return sorted(found, key=lambda one: (one.step is None, one.step or 0, one.kind != "snapshot", one.name))


def _has_manifest(path: StoragePath) -> bool:
    return any(name.endswith(MANIFEST_SUFFIX) and name.removesuffix(MANIFEST_SUFFIX).isdigit() for name in path.names())


def _examine(path: StoragePath, name: str, is_snapshot: bool) -> Listed:
    if is_internevo(path):
        return Listed(
            name, path, "InternEvo", num_bytes=tree_size(path), problem="internlm convert from-internevo reads it"
        )
    kind = "snapshot" if is_snapshot else "checkpoint"
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Listed(name, path, kind, num_bytes=tree_size(path), problem=str(error))
    if manifest is None:
        problem = "its manifest is missing: the save did not finish, or is in progress"
        return Listed(name, path, "incomplete", num_bytes=tree_size(path), problem=problem)
    num_bytes = sum(file.size for file in manifest.files.values())
    try:
        context = context_of(path, manifest)
    except CheckpointError as error:
        return Listed(name, path, kind, manifest, num_bytes, problem=str(error))
    return Listed(name, path, kind, manifest, num_bytes, context)


def tree_size(path: StoragePath) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.size()
    return sum(tree_size(path / name) for name in path.names())


def context_of(path: StoragePath, manifest: Manifest) -> dict[str, Any]:
    """Content of `context.json`; empty for a checkpoint of weights only, which has none.

    Raises:
        CheckpointError: it is damaged.
    """
    if CONTEXT_FILE not in manifest.files:
        return {}
    return _checked(read_context(path), _CONTEXT_SECTIONS, path / CONTEXT_FILE)


def config_of(path: StoragePath, manifest: Manifest) -> dict[str, Any]:
    """Keys of `config.json`, unvalidated because another version may have written it; empty without one.

    Raises:
        CheckpointError: it is damaged.
    """
    if CONFIG_FILE not in manifest.files and not (path / CONFIG_FILE).exists():
        return {}
    try:
        values = read_config_keys(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{path / CONFIG_FILE}' cannot be read: {error}") from error
    return _checked(values, _CONFIG_SECTIONS, path / CONFIG_FILE)


def _checked(values: dict[str, Any], sections: Sequence[str], file: StoragePath) -> dict[str, Any]:
    for name in sections:
        if not isinstance(values.get(name, {}), dict):
            raise CheckpointError(f"'{file}' is damaged: '{name}' is {values[name]!r}, not a section")
    return values


def short_layout(context: Mapping[str, Any]) -> str:
    """The ranks that wrote a checkpoint, and the axes of more than one: `8: pipeline 2, data 4`."""
    if "world_size" not in context:
        return "-"
    first = str(context.get("layout", "")).splitlines()[:1]
    # The line begins with the name of the view.
    axes = re.findall(r"(\w+) (\d+)(?= |$)", first[0].partition("(")[0].partition(" ")[2]) if first else []
    text = ", ".join(f"{axis} {size}" for axis, size in axes if int(size) > 1)
    return f"{context['world_size']}: {text}" if text else f"{context['world_size']}"


@dataclass(frozen=True)
class KindOfTensors:
    """All tensors of one kind in a checkpoint: `model`, `optimizer/master` ..."""

    kind: str
    num_tensors: int
    num_elements: int
    num_bytes: int
    dtypes: tuple[str, ...]


def kinds_of(entries: Mapping[str, Entry]) -> list[KindOfTensors]:
    """Totals by kind, weights first."""
    by_kind: dict[str, list[Entry]] = {}
    for key, entry in entries.items():
        parts = key.split("/")
        by_kind.setdefault("/".join(parts[:2]) if parts[0] == "optimizer" else parts[0], []).append(entry)
    return [
        KindOfTensors(
            kind=kind,
            num_tensors=len(group),
            num_elements=sum(math.prod(entry.shape) for entry in group),
            num_bytes=sum(entry.num_bytes for entry in group),
            dtypes=tuple(sorted({dtype_name(entry.dtype) for entry in group})),
        )
        for kind, group in sorted(by_kind.items())
    ]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


# -- differences -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changed:
    """A value that differs between two checkpoints; None where one lacks it."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class TensorDifference:
    """How the values of a tensor differ.

    Attributes:
        max_difference: largest |a - b|; infinite where only one is NaN or infinite.
        num_different: number of elements with other bits (for different dtypes: with another value).
        num_elements: size of the tensor.
    """

    key: str
    max_difference: float
    num_different: int
    num_elements: int


def changed_values(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Changed]:
    """The leaves in which two trees of dicts differ, by dotted path."""
    one, two = dict(_leaves(first)), dict(_leaves(second))
    return [
        Changed(name, one.get(name), two.get(name))
        for name in sorted(one.keys() | two.keys())
        if (name in one) != (name in two) or one.get(name) != two.get(name)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def changed_entries(first: Mapping[str, Entry], second: Mapping[str, Entry]) -> list[Changed]:
    """Tensors that only one has (None for the other), and those whose shapes or dtypes differ."""
    return [
        Changed(key, first.get(key), second.get(key))
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    ]


def different_tensors(first: TensorReader, second: TensorReader, keys: list[str]) -> Iterator[TensorDifference]:
    """Compare tensors that both have in the same shape; one pair is in memory at a time."""
    for key in keys:
        difference = compare_tensors(key, first.read_key(key), second.read_key(key))
        if difference is not None:
            yield difference


def compare_tensors(key: str, first: Tensor, second: Tensor) -> TensorDifference | None:
    """How two tensors of the same shape differ; None if they are equal."""
    one, two = first.reshape(-1), second.reshape(-1)
    num_different, largest = 0, 0.0
    for part, other in zip(one.split(COMPARED_AT_ONCE), two.split(COMPARED_AT_ONCE), strict=True):
        different = _differing(part, other)
        count = int(different.sum())
        if count:
            num_different += count
            gap = (part[different].double() - other[different].double()).abs()
            # Infinities of one sign and NaNs differ at most in their bits.
            same = (part[different] == other[different]) | (part[different].isnan() & other[different].isnan())
            gap[same] = 0.0
            largest = max(largest, float(gap.nan_to_num(nan=math.inf, posinf=math.inf).max()))
    return TensorDifference(key, largest, num_different, one.numel()) if num_different else None


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _differing(first: Tensor, second: Tensor) -> Tensor:
    if first.dtype == second.dtype:
        bits = _BITS[first.dtype.itemsize]
        return first.view(bits) != second.view(bits)
    return first.double() != second.double()


def weights_only(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries that are weights."""
    return {key: entry for key, entry in entries.items() if key.startswith(MODEL_PREFIX)}
