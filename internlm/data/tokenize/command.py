"""The command line of tools/tokenizer.py: parses, calls, prints."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from internlm.data.tokenize.pipeline import TokenizeOptions, tokenize
from internlm.data.tokenize.text_inputs import FORMATS, TextOptions, find_inputs
from internlm.data.tokenize.train_bpe import sample_texts, train_bpe
from internlm.data.tokenized_writer import rebuild_meta
from internlm.utils.errors import DataError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues where this one stopped", file=sys.stderr)
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.rebuild_meta is not None:
        print(f"{args.rebuild_meta}.meta: {rebuild_meta(args.rebuild_meta):,} documents")
        return
    inputs = tuple(args.inputs + (args.text_input_path or []))
    if not inputs:
        raise DataError("no input: name files or folders, or - for the standard input")
    if args.tokenizer is None:
        raise DataError("--tokenizer is missing")
    if args.train is None and args.output is None:
        raise DataError("--output is missing")
    text = TextOptions(args.text_key, args.whole_files)
    if args.train is not None:
        files = find_inputs([name for name in inputs if name != "-"], args.format)
        if not files:
            raise DataError("--train reads its input twice: it needs files, not the standard input")
        train_bpe(sample_texts(files, text, args.train_bytes), args.train, args.tokenizer)
        print(f"{args.tokenizer}: trained, {args.train} ids")
    if args.output is not None:
        options = TokenizeOptions(
            inputs=inputs,
            output=args.output,
            tokenizer=args.tokenizer,
            text=text,
            format=args.format,
            processes=args.processes,
            append=args.append,
            add_bos=args.bos,
            add_eos=args.eos,
            valid_fraction=args.valid_fraction,
            valid_output=args.valid_output,
            restart=args.restart,
            trust_remote_code=args.trust_remote_code,
        )
        result = tokenize(options)
        ratio = f", {result.num_bytes / result.tokens:.2f} bytes of input a token" if result.tokens else ""
        print(
            f"{args.output}: {result.documents:,} documents, {result.tokens:,} tokens{ratio}, "
            f"{result.megabytes_per_second:.1f} MB/s"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenizer.py", description="Tokenize text into .bin / .bin.meta files, or train a tokenizer on it."
    )
    parser.add_argument("inputs", nargs="*", help="txt, json, jsonl and parquet files, folders of them, or - for stdin")
    parser.add_argument("--text_input_path", "--text-input-path", nargs="+", help="inputs, in InternEvo's spelling")
    parser.add_argument(
        "--tokenizer",
        "--tokenizer_path",
        "--tokenizer-path",
        type=Path,
        help="a tokenizer.json, a Hugging Face tokenizer folder, or a SentencePiece .model; with --train, where to "
        "write the tokenizer.json",
    )
    parser.add_argument("--output", "--bin_output_path", "--bin-output-path", type=Path, help="the .bin file to make")
    parser.add_argument("--append", action="store_true", help="add to an existing output")
    parser.add_argument("--text-key", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument("--whole-files", action="store_true", help="a txt file is one document (default: one a line)")
    parser.add_argument("--format", choices=FORMATS, help="format of inputs whose suffix does not say it")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--bos", action="store_true", help="begin every document with the bos token")
    parser.add_argument(
        "--eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="end every document with the eos token (default: if the tokenizer has one)",
    )
    parser.add_argument("--valid-fraction", type=float, default=0.0, help="share of documents for --valid-output")
    parser.add_argument("--valid-output", type=Path, help="the .bin file of the held-out documents")
    parser.add_argument("--restart", action="store_true", help="forget the parts of an interrupted run")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a tokenizer folder that is nothing else"
    )
    parser.add_argument(
        "--train", type=int, metavar="VOCAB", help="train a byte-level BPE tokenizer of this size first"
    )
    parser.add_argument(
        "--train-bytes",
        type=float,
        default=1e8,
        help="bytes of text to train it on (default: 1e8, about 2 GB of memory)",
    )
    parser.add_argument("--rebuild-meta", type=Path, metavar="BIN", help="write the .meta of a .bin file anew")
    return parser
