"""Imports only go down the floors that doc/design.md lists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers.pages import ROOT, section_of, text_of

PACKAGE = ROOT / "internlm"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def floors() -> dict[str, int]:
    """What a floor holds -> its number, 0 at the top."""
    lines = [line for line in section_of(text_of("doc/design.md"), "Floors").splitlines() if line.startswith("    ")]
    names = [line.strip().split("  ")[0].split(", ") for line in lines]
    return {name: number for number, row in enumerate(names) for name in row}


FLOORS = floors()


def place_of(path: str) -> str | None:
    """The entry of the list to which a file or package below internlm/ belongs."""
    parts = path.removesuffix(".py").split("/")
    return next((name for name in ("/".join(parts[:2]), parts[0]) if name in FLOORS), None)


def imported(path: Path) -> set[str]:
    """The modules below internlm/ that a file imports, as paths."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.add(node.module or "")
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    paths = {module.removeprefix("internlm.").replace(".", "/") for module in modules if module.startswith("internlm.")}
    return {path for path in paths if (PACKAGE / path).is_dir() or (PACKAGE / f"{path}.py").is_file()}


def test_every_entry_exists_and_every_file_has_a_place() -> None:
    for name in FLOORS:
        assert (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file(), name
    homeless = [path for path in FILES if place_of(path) is None and not path.endswith("__init__.py")]
    assert not homeless


@pytest.mark.parametrize("path", [path for path in FILES if not path.endswith("__init__.py")])
def test_imports_go_down(path: str) -> None:
    here = place_of(path)
    assert here is not None
    for module in imported(PACKAGE / path):
        there = place_of(module)
        assert there is None or there == here or FLOORS[there] > FLOORS[here], f"{path} imports {module}"
