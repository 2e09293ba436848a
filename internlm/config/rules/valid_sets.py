"""Rules on validation sets."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config
from internlm.config.schema.valid_folders import DOCUMENT_TYPES, VALID_TYPES


def held_out_documents(config: Config, world_size: int) -> Iterator[Problem]:
    """Documents are held out of a train folder whose files have documents by number."""
    data = config.data
    if data.valid_fraction == 0:
        return
    given = f"data.valid_fraction = {data.valid_fraction}"
    if data.train_folder is None:
        yield Problem(
            ("data.valid_fraction", "data.train_folder"),
            f"{given} holds documents out of data.train_folder, which is None (sources of data.blend hold none out); "
            "give a folder, or remove it",
        )
    elif data.type not in DOCUMENT_TYPES:
        yield Problem(
            ("data.valid_fraction", "data.type"),
            f"{given} needs data.type = {' or '.join(map(repr, DOCUMENT_TYPES))}, which is {data.type!r}: its files "
            "have no documents to hold out; remove it, and give data.valid_folder",
        )


def named_sets(config: Config, world_size: int) -> Iterator[Problem]:
    """Every validation set has a type of files, and keys of that type."""
    data = config.data
    if isinstance(data.valid_folder, str) and data.valid_every > 0 and data.type not in VALID_TYPES:
        yield Problem(
            ("data.valid_folder", "data.type"),
            f"data.valid_folder = {data.valid_folder!r}: data.type = {data.type!r} has no validation files; name their "
            "type, as in data.valid_folder = dict(NAME=dict(path=..., type='tokenized'))",
        )
    if not isinstance(data.valid_folder, dict):
        return
    for name, each in data.valid_folder.items():
        place = f"data.valid_folder[{name!r}]"
        type_name = each.get("type", data.type)
        if type_name not in VALID_TYPES:
            yield Problem(
                ("data.valid_folder", "data.type"),
                f"{place} has no type, and data.type = {data.type!r} has no validation files; give dict(path=..., "
                "type='tokenized')",
            )
        if type_name == "streaming" and data.tokenizer_path is None:
            yield Problem(
                ("data.valid_folder", "data.tokenizer_path"),
                f"{place}: type = 'streaming' needs data.tokenizer_path, the tokenizer of its rows",
            )
        for item in sorted(each.keys() - {"path", "type"}):
            needed = "arrays" if item.startswith("array_") else "streaming"
            if type_name != needed and item != "image_folder":
                yield Problem(
                    ("data.valid_folder",),
                    f"{place}: {item} = {each[item]!r} needs type = {needed!r}, which is {type_name!r}; remove it",
                )
        inherited = data.conversations if type_name == data.type else None
        if type_name == "streaming" and each.get("conversations", inherited) is not None:
            for item in sorted(each.keys() & {"content_name", "text_unit", "add_bos", "add_eos"}):
                yield Problem(
                    ("data.valid_folder", "data.conversations"),
                    f"{place}: {item} = {each[item]!r} has no meaning with conversations, whose text and special "
                    "tokens come from the chat template; remove it, or give the set conversations=None",
                )
