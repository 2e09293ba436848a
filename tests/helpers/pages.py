"""What the documentation says, as data: its code blocks, commands, links, and what it names."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "doc/*.md", "third_party/*.md", "benchmarks/*.md", "requirements/*.md")
    for page in ROOT.glob(pattern)
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("internlm", "python", "bash", "torchrun", "srun")
_TOP_FOLDERS = "benchmarks|configs|doc|internlm|requirements|tests|third_party|tools"


def text_of(page: str) -> str:
    """The source of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def section_of(text: str, title: str) -> str:
    """The part of a page below a heading of the second level."""
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks in a language."""
    return [body for name, body in _FENCE.findall(text) if name == language]


def commands(text: str) -> list[list[str]]:
    """Every shell command, as words: in bash blocks, and in prose as code that starts with one of our programs."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    prose = _FENCE.sub("", text)
    lines += [code for code in re.findall(r"`([^`\n]+)`", prose) if code.split()[0] in _PROGRAMS and " " in code]
    found = []
    for line in lines:
        # "..." stands for something that the reader fills in.
        words = shlex.split(line, comments=True) if "..." not in line else []
        command: list[str] = []
        for word in [*words, ";"]:
            if word in (";", "&&", "|"):
                # Without variables in front, and without a redirection behind.
                program = itertools.dropwhile(lambda word: "=" in word, command)
                found.append(list(itertools.takewhile(lambda word: word != ">", program)))
                command = []
            else:
                command.append(word)
    return [command for command in found if command]


def links(text: str) -> list[str]:
    """The targets of all links and pictures that are not on the web."""
    return [
        target for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", text)) if not re.match(r"https?:", target)
    ]


def anchors(text: str) -> set[str]:
    """The fragments by which the headings of a page can be linked."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named_paths(text: str) -> set[str]:
    """What reads like a path in this repository."""
    return set(re.findall(rf"(?<![\w/.<>-])((?:{_TOP_FOLDERS})/[\w./-]*\w)", text))


def named_objects(text: str) -> set[str]:
    """Dotted names of this package in code."""
    return set(re.findall(r"`(internlm(?:\.\w+)+)", text))
