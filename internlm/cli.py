"""The `internlm` command. Each subcommand is a file in `internlm.commands`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from internlm import __version__
from internlm.utils.entry_point import run_command
from internlm.utils.openmp import set_spin_count

COMMANDS = {
    "train": "train a model from a config file",
    "layout": "show the groups of the ranks, the stages of the model and the timeline of a step",
    "doctor": "show hardware and software, the implementation of each op with the reason, and a self-test",
    "generate": "continue prompts with a trained model",
    "chat": "talk with a trained model in the terminal",
    "serve": "serve a trained model to OpenAI's clients",
    "view": "show the curves, the layout and the timeline of a run on a page, live",
    "eval": "score a trained model in tasks of lm-evaluation-harness",
    "verify": "compare a layout with one process",
    "data": "tokenize, inspect, verify, convert, merge, split and shuffle tokenized data",
    "ckpt": "list, show, compare and check checkpoints",
    "convert": "convert checkpoints to and from Hugging Face, and from InternEvo",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code: 0 success, 1 failure, 2 user error."""
    words = [_with_dashes(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    return run_command(lambda: _run(words))


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="internlm", description="Pretrain language models.")
    parser.add_argument("--version", action="version", version=f"internlm {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        # Import only the chosen command, so that `internlm --help` does not import torch.
        if name == chosen:
            set_spin_count()
            command = importlib.import_module(f"internlm.commands.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    return options.run(options)


def _with_dashes(word: str) -> str:
    """Replace underscores by dashes in an option's name, so that InternEvo's spelling works."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


if __name__ == "__main__":
    sys.exit(main())
