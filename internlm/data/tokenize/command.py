"""The command line of tools/tokenizer.py: parses, calls, prints."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from internlm.data.tokenize.input_files import FORMATS, find_inputs, name_some
from internlm.data.tokenize.pipeline import TokenizeOptions, tokenize
from internlm.data.tokenize.text_inputs import TextOptions
from internlm.data.tokenize.train_bpe import sample_texts, train_bpe
from internlm.data.tokenized_files.writer import rebuild_meta
from internlm.utils.entry_point import run_command
from internlm.utils.errors import DataError
from internlm.utils.paths import local_path, path_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run_command(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    args = _parser().parse_args(arguments)
    try:
        _run(args)
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
    as_internevo = args.text_input_path is not None or args.bin_output_path is not None
    if args.tokenizer is None:
        built_in = "; InternEvo's tool has its own built in, tools/tokenizer_internlm.model: name that file"
        raise DataError(f"--tokenizer is missing{built_in if as_internevo else ''}")
    output = args.output or args.bin_output_path
    if args.output and args.bin_output_path:
        raise DataError("--output and --bin_output_path are two names of one thing: give one")
    if args.train is None and output is None:
        raise DataError("--output is missing")
    text = TextOptions(args.text_key, args.whole_files, strip_lines=as_internevo, raw_json=args.raw_json)
    if args.train is not None:
        found = find_inputs([name for name in inputs if name != "-"], args.format)
        if "-" in inputs or not found.files:
            raise DataError("--train reads its input twice: it needs files, not the standard input")
        if found.left_out and output is None:
            _say(f"left out {len(found.left_out):,} file(s) of no known format: {name_some(found.left_out)}")
        train_bpe(sample_texts(found.files, text, args.train_bytes), args.train, args.tokenizer)
        print(f"{args.tokenizer}: trained, {args.train} ids")
    if output is not None:
        if as_internevo:
            _say_what_internevo_does(args.raw_json)
        options = TokenizeOptions(
            inputs=inputs,
            output=output,
            tokenizer=args.tokenizer,
            text=text,
            format=args.format,
            processes=args.processes,
            append=args.append,
            add_bos=args.bos if args.bos is not None or as_internevo else False,
            add_eos=args.eos,
            valid_fraction=args.valid_fraction,
            valid_output=args.valid_output,
            restart=args.restart,
            trust_remote_code=args.trust_remote_code,
        )
        result = tokenize(options)
        for notice in result.notices:
            _say(notice)
        ratio = f", {result.num_bytes / result.tokens:.2f} bytes of input a token" if result.tokens else ""
        print(
            f"{output}: {result.documents:,} documents, {result.tokens:,} tokens{ratio}, "
            f"{result.megabytes_per_second:.1f} MB/s"
        )


def _say(notice: str) -> None:
    print(f"notice: {notice}", file=sys.stderr)


def _say_what_internevo_does(raw_json: bool) -> None:
    """What the tool of that name does, and what this one does otherwise."""
    _say(
        "like InternEvo's tool, this begins documents with bos, ends them with eos (--no-bos, --no-eos: without) and "
        "strips the lines of txt files"
    )
    if not raw_json:
        _say("of JSON records the text alone is tokenized; InternEvo's tool takes braces and keys, too (--raw-json)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenizer.py", description="Tokenize text into .bin / .bin.meta files, or train a tokenizer on it."
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        type=path_text,
        help="txt, json, jsonl (ndjson) and parquet files, plain or compressed (gz, bz2, xz, zst), folders of them, or "
        "- for stdin",
    )
    parser.add_argument(
        "--text_input_path",
        "--text-input-path",
        nargs="+",
        type=path_text,
        help="inputs, and ids as InternEvo gives them",
    )
    parser.add_argument(
        "--tokenizer",
        "--tokenizer_path",
        "--tokenizer-path",
        type=local_path,
        help="a tokenizer.json, a Hugging Face tokenizer folder, or a SentencePiece .model; with --train, where to "
        "write the tokenizer.json",
    )
    parser.add_argument("--output", type=local_path, help="the .bin file to make")
    parser.add_argument(
        "--bin_output_path", "--bin-output-path", type=local_path, help="--output, and ids as InternEvo's"
    )
    parser.add_argument("--append", action="store_true", help="add to an existing output")
    parser.add_argument("--text-key", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument(
        "--raw-json", action="store_true", help="the JSON of a record is the document, not the text in it"
    )
    parser.add_argument("--whole-files", action="store_true", help="a txt file is one document (default: one a line)")
    parser.add_argument("--format", choices=FORMATS, help="format of inputs whose suffix does not say it")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="begin every document with the bos token (default: no; with InternEvo's options, if there is one)",
    )
    parser.add_argument(
        "--eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="end every document with the eos token (default: if the tokenizer has one)",
    )
    parser.add_argument("--valid-fraction", type=float, default=0.0, help="share of documents for --valid-output")
    parser.add_argument("--valid-output", type=local_path, help="the .bin file of the held-out documents")
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
    parser.add_argument("--rebuild-meta", type=local_path, metavar="BIN", help="write the .meta of a .bin file anew")
    return parser
