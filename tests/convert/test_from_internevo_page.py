"""The tables of doc/from_internevo.md against the code that they speak of."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.commands import metrics_of, write_config
from helpers.pages import ROOT, section_of, text_of

from internlm.checkpoint.internevo import EXPERT_FILE, RANK_FILE
from internlm.cli import COMMANDS
from internlm.config.loader import load_config
from internlm.convert.from_internevo import CONFIG_TEXT, COUNTERS, MODEL_SECTION
from internlm.convert.internevo_shards import PLAN_FILE, SHARD_FILE
from internlm.core.context.parallel_context import ParallelContext
from internlm.initialize.build import build_layout, build_trainer

PAGE = "doc/from_internevo.md"


def rows(title: str) -> list[list[str]]:
    """The cells of every row of a section's tables, without heads."""
    lines = [line for line in section_of(f"\n{text_of(PAGE)}", title).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = {number for number, row in enumerate(cells) if set(row[0]) == {"-"} and len(row[0]) > 1}
    return [row for number, row in enumerate(cells) if number not in rules and number + 1 not in rules]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_tool_that_stands_for_one_exists() -> None:
    for row in rows("Tools"):
        for code in code_in(row[1]):
            words = code.split()
            if words[0] == "internlm":
                assert words[1] in COMMANDS, code
            elif words[0].endswith(".py"):
                assert (ROOT / words[0]).is_file(), code


def test_every_metric_is_one_of_a_run(tmp_path: Path) -> None:
    changes = ["data.total_steps=2", "ckpt.enable_save_ckpt=False"]
    changes += ["model_type=MIXTRALMOE", "model.num_experts=2", "model.moe_type=Dropless"]
    config = load_config(write_config(tmp_path), changes).config
    build_trainer(config, ParallelContext.create(build_layout(config, 1)), tmp_path / "run").fit()
    known = metrics_of(tmp_path / "run")[-1].keys()
    table = [row for row in rows("Metrics and logs") if len(row) == 3]
    assert len(table) > 25
    for _, here, _ in table:
        assert here == "-" or set(code_in(here)) <= known, here


def test_the_import_does_with_each_file_what_the_page_says() -> None:
    read = {CONFIG_TEXT, MODEL_SECTION, COUNTERS}
    for name, _, import_does, _ in rows("Checkpoint files"):
        for pattern in code_in(name):
            file = re.sub(r"\{\w+\}", "3", pattern)
            rank_file = RANK_FILE.fullmatch(file)
            refused = bool(rank_file and rank_file["fsdp"])
            others = (SHARD_FILE, PLAN_FILE, EXPERT_FILE)
            is_read = bool(rank_file) or any(kind.fullmatch(file) for kind in others) or file in read
            expected = (
                "refused" if refused else "read" if is_read else ("if missing" if file == "3.step" else "not read")
            )
            assert import_does.startswith(expected), pattern
