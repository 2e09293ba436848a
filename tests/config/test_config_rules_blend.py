"""Rules on the sources of `data.blend`, and the values that a source takes from the data section."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.configs import small_config

from internlm.config.loader import load_config
from internlm.config.rules import find_problems
from internlm.utils.errors import ConfigError


def texts_of(blend: Any, **data: Any) -> list[str]:
    config = small_config({"data.blend": blend, **{f"data.{name}": value for name, value in data.items()}})
    return [problem.text for problem in find_problems(config, 1) if problem.keys[0].startswith("data.")]


A, B = {"path": "x/a", "weight": 1}, {"path": "x/b", "weight": 2.5}


@pytest.mark.parametrize(
    "blend, data",
    [
        ([A, B], {}),
        ([A, {**B, "weight": [(0, 1), (1000, 0)]}], {}),
        ([{**A, "epochs_max": 1.5, "on_end": "drop"}, {**B, "on_end": "repeat"}], {}),
        (
            [A, {"weight": 2, "blend": [B, {"path": "c", "weight": 1, "min_length": 4, "min_length_dict": {"en": 9}}]}],
            {},
        ),
        ([{**A, "type": "arrays", "array_dtype": "uint16"}, {**B, "type": "megatron"}], {}),
        ([{**A, "type": "tokenized"}, B], {"type": "arrays", "array_dtype": "uint16"}),
        ([{**A, "type": "streaming", "content_name": "body", "add_eos": True}, B], {"tokenizer_path": "t"}),
        ([A, {**B, "type": "tokenized"}], {"type": "streaming", "tokenizer_path": "t", "content_name": "body"}),
        ([A, B], {"fim": {"rate": 0.5, "prefix": 1, "middle": 2, "suffix": 3, "bos": None, "eos": None}}),
    ],
)
def test_accepted(blend: Any, data: dict[str, Any]) -> None:
    assert texts_of(blend, **data) == []


@pytest.mark.parametrize(
    "blend, data, text",
    [
        (
            [A, B],
            {"train_folder": "x"},
            "data.train_folder is given beside data.blend; give it as the path of a source",
        ),
        ([A, B], {"min_length_dict": {"en": 3}}, "data.min_length_dict is given beside data.blend"),
        ([A, A], {}, "data.blend[1].name = 'a' is also the name of data.blend[0]; give each source a name"),
        ([A, {"weight": 1, "blend": [A]}], {}, "data.blend[1].blend[0].name = 'a' is also the name of data.blend[0]"),
        ([{"weight": 1}], {}, "data.blend[0]: give either path, for a source, or blend, for a group of sources"),
        ([{**A, "blend": [B]}], {}, "data.blend[0]: give either path"),
        ([{**A, "path": ""}], {}, "data.blend[0].path = '': give a folder or file"),
        (
            [{"weight": 1, "blend": [A], "epochs_max": 2}],
            {},
            "data.blend[0].epochs_max = 2.0 is for a source, not for a",
        ),
        ([{"weight": 1, "blend": [A], "name": "g"}], {}, "data.blend[0].name = 'g' is for a source"),
        ([{**A, "epochs_max": 2}], {}, "data.blend[0].epochs_max = 2 needs on_end = 'stop'"),
        ([{**A, "epochs_max": 2, "on_end": "repeat"}], {}, "data.blend[0].epochs_max = 2 needs on_end = 'stop'"),
        (
            [{**A, "type": "streaming", "epochs_max": 2, "on_end": "stop"}],
            {"tokenizer_path": "t"},
            "data.blend[0].epochs_max = 2: rows that are tokenized during training have no known number",
        ),
        ([{**A, "on_end": "drop"}], {}, "data.blend[0].on_end = 'drop' needs epochs_max"),
        ([{**A, "weight": -1}], {}, "data.blend[0].weight = -1.0: weights must be at least 0"),
        ([{**A, "weight": [(0, 1), (5, -1)]}], {}, "data.blend[0].weight = [(0, 1.0), (5, -1.0)]: weights must be"),
        ([{**A, "weight": [(5, 1)]}], {}, "data.blend[0].weight = [(5, 1.0)]: expected a number, or [(0, weight)"),
        ([{**A, "weight": []}], {}, "data.blend[0].weight = []: expected a number, or [(0, weight)"),
        (
            [{**A, "weight": 0}, {**B, "weight": [(0, 0), (9, 0.0)]}],
            {},
            "data.blend: all weights are 0 from token 0 on",
        ),
        (
            [{**A, "weight": [(0, 1), (7, 0)]}, {**B, "weight": [(0, 1), (9, 0)]}],
            {},
            "all weights are 0 from token 9 on",
        ),
        (
            [{**A, "array_dtype": "uint16"}],
            {},
            "data.blend[0].array_dtype = 'uint16' needs data.blend[0].type = 'arrays'",
        ),
        ([A, {**B, "content_name": "body"}], {}, "data.blend[1].content_name needs data.blend[1].type = 'streaming'"),
        ([{**A, "type": "streaming"}], {}, "data.blend[0].type = 'streaming' needs data.tokenizer_path"),
    ],
)
def test_refused_by_name(blend: Any, data: dict[str, Any], text: str) -> None:
    found = texts_of(blend, **data)
    assert len(found) == 1 and text in found[0], found


def test_a_source_takes_what_it_lacks_from_the_data_section() -> None:
    source = {**A, "type": "arrays", "array_separator": 0, "min_length": 5}
    rows = {"path": "y/rows", "weight": 1, "type": "streaming"}
    data = small_config(
        {
            "data.type": "arrays",
            "data.array_dtype": "uint16",
            "data.min_length": 3,
            "data.blend": [source, B, rows],
        }
    ).data
    first, second, third = (entry.applied_to(data) for entry in data.blend)
    assert (first.train_folder, first.array_dtype, first.array_separator, first.min_length) == ("x/a", "uint16", 0, 5)
    assert (second.type, second.array_dtype, second.array_separator, second.min_length) == ("arrays", "uint16", None, 3)
    # Keys of other types are not those of this source.
    assert (third.type, third.array_dtype, third.blend) == ("streaming", None, [])
    assert [entry.name for entry in data.blend] == ["a", "b", "rows"]


def test_types_of_values_are_checked_by_place(tmp_path: Any) -> None:
    config = tmp_path / "config.py"
    config.write_text(
        "data = dict(seq_len=8, micro_bsz=1, total_steps=2, blend=[dict(path='a', weight='much'),\n"
        "    dict(weight=1, blend=[dict(path='b', wieght=1)])])\n"
        "model = dict(vocab_size=8, hidden_size=8, num_layers=1, num_attention_heads=1)\n"
        "ckpt = dict(enable_save_ckpt=False)\n"
    )
    with pytest.raises(ConfigError) as refused:
        load_config(config)
    text = str(refused.value)
    assert (
        "data.blend[0].weight = 'much': it must be a valid number, unable to parse string as a number or a valid"
        in text
    )
    assert "data.blend[1].blend[0].wieght is not a known key. Did you mean 'weight'?" in text
    assert "data.blend[1].blend[0].weight is missing" in text
