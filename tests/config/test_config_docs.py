"""doc/config.md is what the schema says."""

from pathlib import Path

from internlm.config.docs import render
from internlm.config.schema import Config
from internlm.config.schema.base import walk_schema

REFERENCE = Path(__file__).parents[2] / "doc" / "config.md"


def test_the_reference_is_up_to_date():
    assert REFERENCE.read_text() == render(), "run: python -m internlm.config.docs > doc/config.md"


def test_every_key_has_a_row_in_its_section():
    section, rows = "", set()
    for line in render().splitlines():
        if line.startswith("## "):
            section = "" if line == "## Top level" else line[3:] + "."
        elif line.startswith("| ") and not line.startswith(("| key", "| in the")) and section != "Older spellings.":
            assert line.count(" | ") == 4 or "status" in line or not section, line
            rows.add(section + line.split(" | ")[0].removeprefix("| "))
    assert {path for path, _ in walk_schema(Config)} <= rows
