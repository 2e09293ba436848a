"""Whoever imports InternEvo's names is told where each went."""

from __future__ import annotations

import importlib
import sys

import pytest
from helpers.pages import section_of, text_of

import internlm
from internlm.utils.former_names import FormerNames, install
from internlm.utils.internevo_names import NAMES, markdown

PAIRS = [(module, name) for module, names in NAMES.items() for name in names]


@pytest.mark.parametrize(("module", "name"), PAIRS, ids=[".".join(pair) for pair in PAIRS])
def test_a_former_name_says_where_it_went(module: str, name: str) -> None:
    with pytest.raises(ImportError) as caught:
        exec(f"from {module} import {name}", {})
    former, message = NAMES[module][name], str(caught.value)
    assert name in message and former.note in message and (former.new or "") in message
    assert "doc/from_internevo.md" in message and not isinstance(caught.value, ModuleNotFoundError)


@pytest.mark.parametrize(
    "place", sorted({former.new for names in NAMES.values() for former in names.values() if former.new})
)
def test_every_new_place_exists(place: str) -> None:
    parts = place.split(".")
    for number in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:number]))
        except ModuleNotFoundError:
            continue
        for part in parts[number:]:
            found = getattr(found, part)
        return
    raise AssertionError(place)


def test_there_are_as_many_as_the_issue_asks_for() -> None:
    assert len({name for names in NAMES.values() for name in names}) >= 100


def test_the_page_has_them_all() -> None:
    assert markdown() in section_of(f"\n{text_of('doc/from_internevo.md')}", "Imports")


def test_attributes_of_the_package_say_it_too() -> None:
    with pytest.raises(ImportError, match=r"internlm\.initialize\.build\.build_trainer"):
        internlm.initialize_trainer  # type: ignore[attr-defined]  # noqa: B018


def test_other_mistakes_stay_what_they_are() -> None:
    assert not hasattr(internlm, "nonsense")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'internlm\.nonsense'"):
        importlib.import_module("internlm.nonsense")
    with pytest.raises(ImportError, match=r"cannot import name 'nonsense' from 'internlm\.core\.context'"):
        exec("from internlm.core.context import nonsense", {})
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'internlm\.core\.nonsense'"):
        exec("import internlm.core.nonsense", {})
    # Modules that are here and share a word with a name of InternEvo's.
    exec("from internlm import data, initialize", {})


def test_there_is_one_finder_and_it_is_the_last_to_be_asked() -> None:
    install()
    assert sum(isinstance(finder, FormerNames) for finder in sys.meta_path) == 1
