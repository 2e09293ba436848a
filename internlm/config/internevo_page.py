"""Regenerates the tables of doc/from_internevo.md from the schema: `python -m internlm.config.internevo_page FILE`.

Each table is enclosed by two comments; the rest of the page is written by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from internlm.config.internevo_differences import DIFFERENCES
from internlm.config.schema import Config
from internlm.config.schema.base import Status, key_info, walk_schema
from internlm.config.unsupported import LATER_FAMILIES, LATER_KEYS


def update(text: str) -> str:
    """The page with each of its tables regenerated.

    Raises:
        ValueError: the comment of a table does not occur exactly once.
    """
    for name, table in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        if text.count(begin) != 1:
            raise ValueError(f"the page has {text.count(begin)} places for the table '{name}'")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{table()}\n{end}{rest.partition(end)[2]}"
    return text


def _defaults() -> str:
    rows = []
    for difference in DIFFERENCES:
        keys = ", ".join(f"`{key}`" for key in difference.keys)
        rows.append(
            (keys, ", ".join(difference.families) or "all", difference.here, difference.theirs, difference.effect)
        )
    return _table(("key left out", "families", "here", "InternEvo", "meaning"), rows)


def _refused() -> str:
    by_feature: dict[str, list[str]] = {}
    for path, field in walk_schema(Config):
        info = key_info(field)
        if info is not None and info.status is Status.LATER:
            by_feature.setdefault(info.detail, []).append(f"`{path}`")
        elif info is not None and info.status is Status.LIBRARY_ONLY:
            by_feature.setdefault(f"in training: {info.detail}", []).append(f"`{path}`")
    for pattern, feature in LATER_KEYS.items():
        by_feature.setdefault(feature, []).append(f"`{pattern}`")
    for family, feature in LATER_FAMILIES.items():
        by_feature.setdefault(feature, []).append(f"`model_type = '{family}'`")
    return _table(("feature", "keys"), [(feature, ", ".join(keys)) for feature, keys in by_feature.items()])


def _no_effect() -> str:
    rows = []
    for path, field in walk_schema(Config):
        info = key_info(field)
        if info is not None and info.status is Status.NO_EFFECT and not path.startswith("generation."):
            rows.append((f"`{path}`", info.detail))
    rows.append(("`generation.*`", "`internlm generate` takes its settings from the command line"))
    return _table(("key", "why"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {"defaults": _defaults, "refused": _refused, "no effect": _no_effect}


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(update(page.read_text(encoding="utf-8")), encoding="utf-8")
