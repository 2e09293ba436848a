"""Rules on the sources of `data.blend`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from internlm.config.problem import Problem
from internlm.config.schema import BlendEntryConfig, Config, DataConfig
from internlm.config.schema.base import Status, key_info

_OF_GROUPS = ("blend", "weight")
"""Keys of a group of sources."""


def blend(config: Config, world_size: int) -> Iterator[Problem]:
    """The entries of a blend must be complete, and nothing else may name data for training."""
    data = config.data
    if not data.blend:
        return
    for name in ("train_folder", "min_length_dict"):
        if getattr(data, name) is not None:
            fix = "give it as the path of a source" if name == "train_folder" else "give it in the sources it is for"
            yield Problem((f"data.{name}", "data.blend"), f"data.{name} is given beside data.blend; {fix}")
    entries = list(_walk(data.blend, "data.blend"))
    for key, entry in entries:
        for text in (*_problems_of(entry, data), *_weight_problems(entry)):
            yield Problem(("data.blend",), f"{key}{text}")
    names: dict[str, str] = {}
    for key, entry in entries:
        if entry.path is None or entry.name is None:
            continue
        if entry.name in names:
            yield Problem(
                ("data.blend",),
                f"{key}.name = {entry.name!r} is also the name of {names[entry.name]}; give each source a name",
            )
        names.setdefault(entry.name, key)


def _walk(entries: list[BlendEntryConfig], key: str) -> Iterator[tuple[str, BlendEntryConfig]]:
    for number, entry in enumerate(entries):
        yield f"{key}[{number}]", entry
        yield from _walk(entry.blend, f"{key}[{number}].blend")


def _problems_of(entry: BlendEntryConfig, data: DataConfig) -> Iterator[str]:
    if (entry.path is None) == (not entry.blend):
        yield ": give either path, for a source, or blend, for a group of sources"
        return
    if entry.blend:
        for name in sorted(entry.model_fields_set - set(_OF_GROUPS)):
            if getattr(entry, name) is not None:
                yield f".{name} = {getattr(entry, name)!r} is for a source, not for a group; give it in its sources"
        return
    if entry.path == "":
        yield ".path = '': give a folder or file"
    if entry.epochs_max is not None and entry.on_end not in ("stop", "drop"):
        yield (
            f".epochs_max = {entry.epochs_max:g} needs on_end = 'stop' (training ends) or 'drop' (the others continue)"
        )
    if entry.epochs_max is None and entry.on_end in ("stop", "drop"):
        yield f".on_end = {entry.on_end!r} needs epochs_max, the number of epochs after which the source ends"
    info, kind = key_info(DataConfig.model_fields["type"]), entry.type or data.type
    if entry.type is not None and info is not None and info.status is Status.LATER and entry.type not in info.accepts:
        yield f".type = {entry.type!r}: this source is not yet supported; use one of {info.accepts}"
    for name, needed in (
        ("array_dtype", "arrays"),
        ("array_separator", "arrays"),
        ("content_name", "streaming"),
        ("subset_name", "streaming"),
    ):
        if getattr(entry, name) is not None and kind != needed:
            yield f".{name} = {getattr(entry, name)!r} needs type = {needed!r}, which is {kind!r}; remove it"


def _weight_problems(entry: BlendEntryConfig) -> Iterator[str]:
    if any(weight < 0 for _, weight in entry.steps):
        yield f".weight = {entry.weight}: weights must be at least 0"
    tokens = [first for first, _ in entry.steps]
    if tokens[:1] != [0] or any(first >= second for first, second in pairwise(tokens)):
        yield (
            f".weight = {entry.weight}: expected a number, or [(0, weight), (tokens, weight), ...] with ascending "
            "tokens, the first from 0"
        )
