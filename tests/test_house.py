"""The house is in order: files have a guessable place, a readable length, and names of their own."""

from __future__ import annotations

import ast
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest
from helpers.pages import ROOT, section_of, text_of

PACKAGE, TESTS = ROOT / "internlm", ROOT / "tests"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LONGEST, LONGEST_OF_MOST = 500, 350

# Folders of tests that exercise the whole program instead of one package, and what tests share.
NOT_MIRRORED = {"cuda", "end_to_end", "helpers", "layouts"}


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): lines_of(path) for path in SOURCES}
    assert not {path: length for path, length in lengths.items() if length > LONGEST}
    assert statistics.quantiles(lengths.values(), n=10)[-1] < LONGEST_OF_MOST


def test_the_questions_of_a_newcomer_lead_to_files() -> None:
    rows = re.findall(r"^\| (.+\?) \| (.+) \|$", section_of(text_of("doc/design.md"), "Where to find it"), re.MULTILINE)
    assert len(rows) == 15
    for question, answer in rows:
        named = re.findall(r"`(internlm/[\w/.]+)`", answer)
        assert named, question
        for path in named:
            assert (ROOT / path).exists(), f"{question} {path}"


def test_no_two_public_classes_share_a_name() -> None:
    names = Counter(
        node.name
        for path in SOURCES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("path", sorted(path.relative_to(TESTS).as_posix() for path in TESTS.glob("*/**/*.py")))
def test_tests_mirror_the_package(path: str) -> None:
    folder, name = Path(path).parent, Path(path).name
    if folder.parts[0] in NOT_MIRRORED:
        return
    assert (PACKAGE / folder).is_dir(), f"no package internlm/{folder}"
    assert name.startswith("test_"), "what tests share lies in tests/helpers"


@pytest.mark.parametrize("path", sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py")))
def test_tests_share_only_helpers(path: str) -> None:
    for node in ast.walk(ast.parse((TESTS / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module or ""
        elif isinstance(node, ast.Import):
            module = node.names[0].name
        else:
            continue
        assert not module.startswith(("tests", "test_")), f"line {node.lineno}: import from helpers"


def test_no_two_test_files_share_a_name() -> None:
    """Pytest imports them by their names alone."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]
