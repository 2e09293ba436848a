"""`internlm data`: prepares files of tokenized documents."""

from __future__ import annotations

import argparse

from internlm.commands.data_tokenize import add_tokenize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_tokenize(actions)


def run(options: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit code."""
    return options.act(options)
