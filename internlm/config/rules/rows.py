"""Rules on data.type = "streaming": rows that are tokenized during training."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config

_DEFAULTS = {
    "content_name": "text",
    "subset_name": None,
    "text_unit": None,
    "add_bos": False,
    "add_eos": None,
    "conversations": None,
}


def streaming(config: Config, world_size: int) -> Iterator[Problem]:
    """The keys of rows are for no other type of data, and rows need a tokenizer."""
    data = config.data
    given = [name for name, default in _DEFAULTS.items() if getattr(data, name) != default]
    if data.type != "streaming":
        for name in given:
            key = f"data.{name}"
            yield Problem((key, "data.type"), f"{key} needs data.type = 'streaming', which is {data.type!r}; remove it")
        return
    for name, what in (("train_folder", "the folder or name of the dataset"), ("tokenizer_path", "the tokenizer")):
        if getattr(data, name) is None and not (name == "train_folder" and data.blend):
            key = f"data.{name}"
            yield Problem(("data.type", key), f"data.type = 'streaming' needs {key}: {what}")
    if data.conversations is not None:
        for name in ("content_name", "text_unit", "add_bos", "add_eos"):
            if name in given:
                yield Problem(
                    ("data.conversations", f"data.{name}"),
                    f"data.{name} has no meaning with data.conversations, whose text and special tokens come from the "
                    "chat template; remove it",
                )
