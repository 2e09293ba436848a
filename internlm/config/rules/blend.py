"""Rules on the sources of `data.blend`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from internlm.config.problem import Problem
from internlm.config.rules import rows, run
from internlm.config.schema import BlendEntryConfig, Config

_DATA_KEY = re.compile(r"\bdata\.(\w+)")
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
        for text in (*_problems_of(entry), *_weight_problems(entry)):
            yield Problem(("data.blend",), f"{key}{text}")
        if entry.path is not None:
            yield from _problems_alone(entry, key, config)
    changes = sorted({tokens for _, entry in entries for tokens, _ in entry.steps})
    first_empty = next((tokens for tokens in changes if not _has_weight(data.blend, tokens)), None)
    if first_empty is not None:
        text = f"data.blend: all weights are 0 from token {first_empty:,} on; give one above 0"
        yield Problem(("data.blend",), text)
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


def _problems_alone(entry: BlendEntryConfig, key: str, config: Config) -> Iterator[Problem]:
    """The problems that the keys of a source would have in the data section, under the name of the entry."""
    if entry.epochs_max is not None and (entry.type or config.data.type) == "streaming":
        yield Problem(
            ("data.blend",),
            f"{key}.epochs_max = {entry.epochs_max:g}: rows that are tokenized during training have no known number of "
            "samples; leave epochs_max and on_end out, or tokenize them before",
        )
    alone = config.model_copy(update={"data": entry.applied_to(config.data)})
    for rule in (run.token_arrays, rows.streaming):
        for problem in rule(alone, 1):
            if "data.tokenizer_path" in problem.keys and config.data.type == "streaming":
                continue  # the same problem of the data section
            yield Problem(("data.blend",), _DATA_KEY.sub(lambda found: _in_entry(found, key), problem.text))


def _in_entry(found: re.Match[str], key: str) -> str:
    return f"{key}.{found[1]}" if found[1] in BlendEntryConfig.model_fields else found[0]


def _problems_of(entry: BlendEntryConfig) -> Iterator[str]:
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


def _has_weight(entries: list[BlendEntryConfig], tokens: int) -> bool:
    """Whether any source has a weight above 0 after that many tokens."""
    return any(
        next((weight for first, weight in reversed(entry.steps) if first <= tokens), 1) != 0
        and (not entry.blend or _has_weight(entry.blend, tokens))
        for entry in entries
    )


def _weight_problems(entry: BlendEntryConfig) -> Iterator[str]:
    if any(weight < 0 for _, weight in entry.steps):
        yield f".weight = {entry.weight}: weights must be at least 0"
    tokens = [first for first, _ in entry.steps]
    if tokens[:1] != [0] or any(first >= second for first, second in pairwise(tokens)):
        yield (
            f".weight = {entry.weight}: expected a number, or [(0, weight), (tokens, weight), ...] with ascending "
            "tokens, the first from 0"
        )
