"""The table of classes and layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.hf_runs import class_folder

from internlm.initialize.hf_class_checks import ClassDifferences
from internlm.utils.errors import ConfigError
from internlm.verify.hf_class_table import LAYOUTS, ClassRow, class_name, config_text
from internlm.verify.report import Verdict


def refuse() -> Verdict:
    raise ConfigError("it adds positions")


def row(**results: str) -> ClassRow:
    result = ClassRow("Some", ClassDifferences(1e-6, 0.5, float("inf")))
    for column in LAYOUTS:
        runs = {"equal": Verdict, "different": lambda: Verdict(failure="loss differs"), "refused": refuse}
        result.add(column, runs[results.get(column, "equal")])
    return result


def test_a_row_says_what_is_equal_and_why_the_rest_is_not() -> None:
    found = row(pipeline="refused", mtp="different")
    assert str(found) == "| Some | equal | 5e-01 | equal | equal | different | refused | equal |"
    assert found.reasons == ["mtp: loss differs", "pipeline: it adds positions"]


def test_a_refusal_is_right_and_a_difference_is_not() -> None:
    assert row(pipeline="refused").is_right
    assert not row(mtp="different").is_right
    assert not ClassRow("Some", ClassDifferences(0.1, 0.1, 0.1)).is_right


def test_the_config_names_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from internlm.config.loader import load_config

    (tmp_path / "config.py").write_text(config_text(class_folder("qwen3", tmp_path / "class"), packed=False))
    config = load_config(tmp_path / "config.py").config
    assert class_name(config) == "Qwen3ForCausalLM" and not config.data.use_packed_dataset
