"""`internlm data tokenize`: text and conversations to tokenized files."""

from __future__ import annotations

import argparse
from typing import Any

from internlm.data.tokenize.command import add_tokenize_options, run_tokenize

_SUMMARY = "tokenize text or conversations into .bin / .bin.meta files, or train a tokenizer on text"


def add_tokenize(actions: Any) -> None:
    """Add the action to the subparsers of `internlm data`; it sets `act`, which takes the options."""
    parser: argparse.ArgumentParser = actions.add_parser("tokenize", help=_SUMMARY, description=_SUMMARY)
    add_tokenize_options(parser)
    parser.set_defaults(act=run_tokenize)
