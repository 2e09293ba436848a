"""Each validation set has the keys of its own type; those left out are those of the data section, for the same type."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers.chat_templates import save_chat_tokenizer
from helpers.configs import small_config

from internlm.config.rules.valid_sets import named_sets
from internlm.config.schema import Config
from internlm.initialize.valid_sets import find_sets
from internlm.utils.errors import DataError


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer; rows/{physics,biology} with the columns abstract and text; lines.txt; chats.jsonl."""
    save_chat_tokenizer(tmp_path / "tokenizer")
    for subset, count in (("physics", 3), ("biology", 5)):
        (tmp_path / "rows" / subset).mkdir(parents=True)
        table = pyarrow.table({"abstract": [f"long words of {subset}"] * count, "text": ["a"] * count})
        pyarrow.parquet.write_table(table, tmp_path / "rows" / subset / "a.parquet")
    (tmp_path / "lines.txt").write_text("one\ntwo\n\nthree\n")
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    return tmp_path


def config_of(folder: Path, sets: dict[str, Any], **data: Any) -> Config:
    keys = {"valid_folder": sets, "valid_every": 1, "tokenizer_path": str(folder / "tokenizer"), **data}
    return small_config({f"data.{name}": value for name, value in keys.items()})


def sizes(config: Config) -> dict[str, tuple[int, int]]:
    """(documents, tokens) of each set."""
    files = {each.name: each.open(None) for each in find_sets(config)}
    return {
        name: (sum(map(len, opened)), sum(int(file.counts().sum()) for file in opened))
        for name, opened in files.items()
    }


@pytest.mark.parametrize("type_name", ["tokenized", "streaming"])
def test_each_set_has_its_own_column_and_subset(folder: Path, type_name: str) -> None:
    rows = {"path": str(folder / "rows"), "type": "streaming"}
    lines = {"path": str(folder / "lines.txt"), "type": "streaming"}
    sets = {
        "abstracts": {**rows, "subset_name": "physics", "content_name": "abstract"},
        "physics": {**rows, "subset_name": "physics"},
        "biology": {**rows, "subset_name": "biology"},
        "lines": lines,
        "paragraphs": {**lines, "text_unit": "paragraph"},
        "no_eos": {**lines, "text_unit": "paragraph", "add_eos": False},
        "chats": {"path": str(folder / "chats.jsonl"), "type": "streaming", "conversations": {"learn": "last"}},
    }
    found = sizes(config_of(folder, sets, type=type_name))
    assert {name: documents for name, (documents, _) in found.items()} == {
        "abstracts": 3, "physics": 3, "biology": 5, "lines": 3, "paragraphs": 2, "no_eos": 2, "chats": 1,
    }  # fmt: skip
    assert found["abstracts"][1] > found["physics"][1] and found["paragraphs"][1] == found["no_eos"][1] + 2


def test_keys_left_out_are_those_of_the_data_section_for_the_same_type(folder: Path) -> None:
    rows = {"path": str(folder / "rows"), "subset_name": "physics"}
    config = config_of(folder, {"a": rows, "b": {**rows, "content_name": "text"}}, type="streaming", content_name="abs")
    a, b = ({name: value} for name, value in config.data.valid_folder.items())
    with pytest.raises(DataError, match="'abs'"):
        sizes(config_of(folder, a, type="streaming", content_name="abs"))
    assert sizes(config_of(folder, b, type="streaming", content_name="abs"))["b"][0] == 3
    # A set of rows in a run on conversations.
    mixed = {"b": {**rows, "content_name": "text", "conversations": None}}
    assert sizes(config_of(folder, mixed, type="streaming", conversations={}))["b"][0] == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"content_name": "a", "type": "megatron"}, "content_name = 'a' needs type = 'streaming', which is 'megatron'"),
        ({"add_bos": True}, "add_bos = True needs type = 'streaming', which is 'tokenized'"),
        ({"array_separator": 0}, "array_separator = 0 needs type = 'arrays', which is 'tokenized'"),
        (
            {"type": "streaming", "conversations": {}, "content_name": "a"},
            "content_name = 'a' has no meaning with conversations",
        ),
    ],
)
def test_keys_of_another_type_are_refused(keys: dict[str, Any], message: str) -> None:
    config = small_config(
        {"data.valid_folder": {"x": {"path": "/x", **keys}}, "data.valid_every": 1, "data.tokenizer_path": "t"}
    )
    (problem,) = named_sets(config, 1)
    assert problem.text.startswith(f"data.valid_folder['x']: {message}")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"content_name": 3}, "content_name = 3 must be the column with the text"),
        ({"text_unit": "word"}, "text_unit = 'word' must be 'line', 'paragraph' or 'file'"),
        ({"add_eos": 1}, "add_eos = 1 must be True or False"),
        ({"conversations": {"lern": "all"}}, "conversations = {'lern': 'all'} must be a dict as data.conversations"),
        ({"column": "a"}, "'column' is not one of path, type, "),
        ({"array_separator": True}, "array_separator = True must be an id"),
    ],
)
def test_values_that_no_key_has_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        small_config({"data.valid_folder": {"x": {"path": "/x", **keys}}})
