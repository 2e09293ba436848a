"""The documentation is true: its code runs, its commands parse, and what it names exists."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from helpers.forked import run_forked
from helpers.pages import PAGES, ROOT, anchors, blocks, commands, links, named_objects, named_paths, section_of, text_of
from torch.distributed.run import get_args_parser

from internlm.cli import COMMANDS, main
from internlm.config.loader import load_config
from internlm.config.schema import Config
from internlm.data.tokenized_files.writer import TokenizedWriter

# Files that a page tells the reader to write, or commands to make.
READERS_FILES = {"my_config.py", "train_my_lists.py"}
OTHER_PROGRAMS = {"source", "zcat", "tensorboard"}

# What a config needs at least, for blocks that show a part of one.
DATA = {"seq_len": 8, "micro_bsz": 1, "total_steps": 2}
MODEL = {"vocab_size": 8, "hidden_size": 8, "num_layers": 1, "num_attention_heads": 1, "dtype": "torch.float32"}


# -- code ------------------------------------------------------------


def run_blocks(sources: list[str], page: str) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for source in sources:
        exec(compile(source, page, "exec"), namespace)


def is_config(source: str) -> bool:
    """Whether setting config keys is all that a block does."""
    statements = ast.parse(source).body
    return all(
        isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Name)
        and statement.targets[0].id in Config.model_fields
        for statement in statements
    )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(text_of(page), "python")])
def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    sources = blocks(text_of(page), "python")
    for source in filter(is_config, sources):
        config = tmp_path / "config.py"
        config.write_text(f"data, model = {DATA}, {MODEL}\n{source}")
        load_config(config)
    printed = run_forked(tmp_path, run_blocks, [source for source in sources if not is_config(source)], page)
    if page == "doc/library.md":
        losses = printed_losses(printed)
        assert losses[-1] < 0.6 * losses[0]
        assert "[13, 15, 17, 19, 21]" in printed


def printed_losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"^step \d+  loss (\S+)$", printed, re.MULTILINE)]


# A thread of a process group that is left when the interpreter ends can abort the process.
# Into a file of each rank: lines that two ranks print at once may mix.
COUNT_THREADS = """
import os, pathlib
names = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
pathlib.Path(f"threads_left_{os.environ.get('RANK', 'alone')}").write_text(str(names.count("pt_gloo_runloop")))
"""


def test_the_library_script_gives_the_same_losses_on_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "train_my_lists.py"
    script.write_text(blocks(text_of("doc/library.md"), "python")[0])
    script.write_text(script.read_text() + COUNT_THREADS)
    alone = printed_losses(run_forked(tmp_path, run_blocks, [script.read_text()], "doc/library.md"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script.name]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    # Four decimals are printed; summing in another order moves the fifth.
    assert printed_losses(result.stdout) == pytest.approx(alone, abs=2e-4)
    assert len(alone) == 4
    assert [(tmp_path / f"threads_left_{rank}").read_text() for rank in range(2)] == ["0", "0"]


# -- the quick start, with sizes that take seconds ------------------------------------------------------------

SMALLER = {
    "total_steps=200": "total_steps=4",
    "valid_every=100": "valid_every=2",
    "checkpoint_every=100": "checkpoint_every=2",
    "hidden_size=128": "hidden_size=32",
    "vocab_size=1024": "vocab_size=300",
    "--train 1024": "--train 300",
    "seq_len=128": "seq_len=32",
    "data.total_steps=400": "data.total_steps=6",
}


def run_commands(section: str) -> None:
    for command in commands(section):
        sys.argv = command[1:] if command[0] == "python" else command
        try:
            if command[0] == "python":
                runpy.run_path(str(ROOT / command[1]), run_name="__main__")
            else:
                assert command[0] == "internlm"
                sys.exit(main(command[1:]))
        except SystemExit as end:
            assert not end.code, command


def test_the_quick_start_on_own_text(tmp_path: Path) -> None:
    section = section_of(text_of("doc/quickstart.md"), "Your own text")
    for large, small in SMALLER.items():
        assert large in section, large
        section = section.replace(large, small)
    (source,) = blocks(section, "python")
    (tmp_path / "my_config.py").write_text(source)
    (tmp_path / "my_text").mkdir()
    for number, page in enumerate(PAGES):
        for part, paragraph in enumerate(text_of(page).split("\n\n")):
            (tmp_path / "my_text" / f"{number}_{part}.txt").write_text(paragraph)
    printed = run_forked(tmp_path, run_commands, section)
    assert "my_config.py:" in printed  # where --print-config says that values come from
    assert "the config is valid" in printed
    assert "resuming at step 4 of 6" in printed
    assert "Once upon a time" in printed

    run = tmp_path / "runs" / "my_model"
    assert {path.name for path in (run / "checkpoints" / "6").iterdir()} >= {
        ".metadata", "__0_0.distcp", "context.json", "config.json", "config_file.py", "6.step",
    }  # fmt: skip
    for path in ("metrics.jsonl", "logs/rank0.log", "tensorboards"):
        assert (run / path).exists(), path
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    names = metric_names()
    for name in {name for line in lines for name in line}:
        assert any(fnmatchcase(name, pattern) for pattern in names), f"{name} is not in doc/quickstart.md"
    unknown = [p for p in names if not any(fnmatchcase(name, p) for line in lines for name in line)]
    assert not unknown, f"in doc/quickstart.md, but no run writes them: {unknown}"


def metric_names() -> list[str]:
    """The names in the table of the quick start, `<...>` as a wildcard; mfu needs a device with a known peak.

    Without those of other data than the quick start has, which are "with `data....`".
    """
    section = section_of(text_of("doc/quickstart.md"), "What a run writes")
    cells = [
        line.split("|")[1] for line in section.splitlines() if line.startswith("| `") and "| with `data." not in line
    ]
    names = [re.sub(r"<\w+>|\.\.\.", "*", name) for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return [name for name in [*names, "tflops_full"] if name != "mfu"]


def test_the_data_tools_do_what_the_page_shows(tmp_path: Path) -> None:
    section = text_of("doc/data.md").split("\n### Inspect, verify, convert\n")[1].split("\n### ")[0]
    for kind in ("en", "cn"):
        (tmp_path / "data" / "train" / kind).mkdir(parents=True)
        with TokenizedWriter(tmp_path / "data" / "train" / kind / "a.bin") as writer:
            for number in range(1, 40):
                writer.write([number] * number)
    config = f"data, model = {DATA | {'train_folder': 'data/train'}}, {MODEL | {'vocab_size': 300}}\n"
    (tmp_path / "my_config.py").write_text(config + "ckpt = dict(enable_save_ckpt=False)\n")
    (block,) = blocks(section, "bash")
    printed = run_forked(tmp_path, run_commands, f"```bash\n{block}\n```\n")
    for expected in ("cn", "78 documents, 1,560 tokens", "sample 0", "good, 39 documents", "type='arrays'"):
        assert expected in printed, expected
    made = {path.relative_to(tmp_path / "data").as_posix() for path in (tmp_path / "data").rglob("*.*")}
    assert made >= {"megatron/en.idx", "arrays/en.ds.index", "arrays/en.npy", "parquet/en.parquet", "shuffled.bin.meta"}
    assert (tmp_path / "lengths.png").is_file()


def test_the_run_on_rendered_words(tmp_path: Path) -> None:
    section = section_of(text_of("doc/multimodal.md"), "A run on rendered words")
    small = {
        "total_steps=1500": "total_steps=4",
        "every=500": "every=2",
        "--train 8000": "--train 60",
    }
    for large, small_one in small.items():
        assert large in section, large
        section = section.replace(large, small_one)
    (source,) = blocks(section, "python")
    (tmp_path / "my_config.py").write_text(source)
    printed = run_forked(tmp_path, run_commands, section)
    for expected in ("the config is valid", "[picture ", "words_loss", "done: 4 steps"):
        assert expected in printed, expected
    assert (tmp_path / "data" / "words" / "images" / "000000.png").is_file()
    data = text_of("doc/multimodal.md").split("\n### Tokenized beforehand\n")[1].split("\n## ")[0]
    assert "60 documents" in run_forked(tmp_path, run_commands, data)


# -- commands ------------------------------------------------------------


class Parsed(BaseException):
    """Carries what a program understood of its arguments past its own exception handling."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`parse(script or None for internlm, arguments)`: as the program itself parses them."""
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: Any, args: Any = None, namespace: Any = None) -> None:
        raise Parsed(original(self, args, namespace))

    def parse_by(script: Path | None, arguments: list[str]) -> argparse.Namespace:
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
            patch.setattr(sys, "argv", [str(script), *arguments])
            patch.syspath_prepend(str(ROOT))
            if script is not None:
                patch.syspath_prepend(str(script.parent))  # as Python does for a script
            try:
                main(arguments) if script is None else runpy.run_path(str(script), run_name="__main__")
            except Parsed as parsed:
                return parsed.options
            except SystemExit as end:
                # argparse has said why on stderr, or --version has printed.
                assert end.code == 0, arguments
        return argparse.Namespace()

    return parse_by


def check(command: list[str], parse: Any) -> None:
    """Fails if the command names a file, module or option that does not exist."""
    program, arguments = Path(command[0]).name, command[1:]
    if program == "internlm" and arguments[0] in COMMANDS and len(arguments) == 1:
        return  # prose that speaks of a command
    if program == "internlm":
        check_options(parse(None, arguments))
    elif program == "python":
        if arguments[0] == "-m":
            assert arguments[1] == "venv" or importlib.util.find_spec(arguments[1]), command
        elif arguments[0] not in READERS_FILES:
            assert (ROOT / arguments[0]).is_file(), arguments[0]
            if arguments[1:]:
                check_options(parse(ROOT / arguments[0], arguments[1:]))
    elif program == "torchrun":
        options = get_args_parser().parse_args(arguments)
        check(["python", options.training_script, *options.training_script_args], parse)
    elif program == "srun":
        check(arguments[arguments.index("python") :], parse)
    elif program == "bash":
        check_bash(arguments, parse)
    elif program == "pip":
        if "-c" in arguments:
            assert (ROOT / arguments[arguments.index("-c") + 1]).is_file(), command
    else:
        assert program in OTHER_PROGRAMS, f"is {program} right? {command}"


def check_bash(arguments: list[str], parse: Any) -> None:
    script, *rest = arguments
    assert (ROOT / script).is_file(), script
    if script == "tools/demo.sh":
        train = [word for word in rest if word != "--fresh"]
        check(["internlm", "train", "--config", "configs/demo.py", *train], parse)
    elif script == "tools/setup_env.sh":
        assert rest in ([], ["dev"])
    elif script == "tools/test.sh":
        for word in rest:
            assert word.startswith("-") or (ROOT / word).exists(), word
    elif script == "benchmarks/gpu_check.sh":
        assert all(f"    {word})" in text_of(script) for word in rest), arguments
    else:
        assert not rest, arguments


def check_options(options: argparse.Namespace) -> None:
    config = getattr(options, "config", None)
    if config is None or str(config) in READERS_FILES:
        return
    assert (ROOT / config).is_file(), config
    if config == "configs/demo.py":
        load_config(ROOT / config, options.overrides)


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_files_and_options_that_exist(page: str, parse: Any) -> None:
    for command in commands(text_of(page)):
        check(command, parse)


def test_the_check_of_commands_sees_mistakes(parse: Any) -> None:
    for wrong in (
        "internlm trian --config configs/demo.py",
        "internlm train --config configs/demo.py --dryrun",
        "internlm train --config configs/none.py",
        "python tools/none.py",
        "torchrun --nproc_per_node=2 train.py --config configs/none.py",
        "bash tools/demo.sh --freshly",
        "bash tools/none.sh",
        "make all",
    ):
        (command,) = commands(f"```bash\n{wrong}\n```\n")
        with pytest.raises(AssertionError):
            check(command, parse)


# -- names ------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_and_names_lead_somewhere(page: str) -> None:
    text = text_of(page)
    folder = (ROOT / page).parent
    for link in links(text):
        target, _, anchor = link.partition("#")
        path = folder / target if target else ROOT / page
        assert path.exists(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{page} links to {link}"
    for name in named_paths(text):
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), f"{page} names {name}"
    for name in named_objects(text):
        pkgutil.resolve_name(name)


def test_every_page_is_reached_from_the_readme() -> None:
    reached = {"README.md"}
    waiting = ["README.md"]
    while waiting:
        page = waiting.pop()
        for link in links(text_of(page)):
            target = ((ROOT / page).parent / link.partition("#")[0]).resolve()
            name = target.relative_to(ROOT).as_posix()
            if name in PAGES and name not in reached:
                reached.add(name)
                waiting.append(name)
    assert reached == set(PAGES)


def test_every_benchmark_is_described() -> None:
    text = text_of("benchmarks/README.md")
    assert not [path.name for path in (ROOT / "benchmarks").glob("*.py") if f"`{path.name}`" not in text]
