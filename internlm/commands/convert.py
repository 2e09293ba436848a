"""`internlm convert`: checkpoints to and from the formats of others. Needs no GPU, and never holds a whole model."""

from __future__ import annotations

import argparse

from internlm.utils.logging import configure_logging

DTYPES = ("bf16", "fp16", "fp32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the directions and their options."""
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    _add_to_hf(directions.add_parser("to-hf", help="write a folder that transformers loads"))
    _add_from_hf(directions.add_parser("from-hf", help="read a Hugging Face folder"))


def run(options: argparse.Namespace) -> int:
    """Convert; returns the exit code."""
    configure_logging()
    return options.convert(options)


def _add_to_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="checkpoint, or a folder of them (newest)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must be new or empty")
    parser.add_argument(
        "--layout",
        choices=("transformers", "published"),
        default="transformers",
        help="names of transformers' own classes (default), or those of the family's published checkpoints",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the weights (default: as stored)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one weight file (default: 5GB)")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer to put beside the weights (default: that of the folder it was imported from, else "
        "data.tokenizer_path of the run)",
    )
    parser.set_defaults(convert=_to_hf)


def _to_hf(options: argparse.Namespace) -> int:
    raise NotImplementedError


def _add_from_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", required=True, metavar="DIR", help="folder with config.json and weights")
    parser.add_argument("--out", required=True, metavar="DIR", help="save folder in which checkpoint 0/ is made")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the weights (default: as stored)")
    parser.set_defaults(convert=_from_hf)


def _from_hf(options: argparse.Namespace) -> int:
    raise NotImplementedError
