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
        print("interrupted: run the same command again to continue", file=sys.stderr)
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
        hint = "; InternEvo's tool has a built-in one, tools/tokenizer_internlm.model: name that file"
        raise DataError(f"--tokenizer is missing{hint if as_internevo else ''}")
    output = args.output or args.bin_output_path
    if args.output and args.bin_output_path:
        raise DataError("--output and --bin_output_path are the same option: give one")
    if args.train is None and output is None:
        raise DataError("--output is missing")
    text = TextOptions(args.text_key, args.whole_files, strip_lines=as_internevo, raw_json=args.raw_json)
    if args.train is not None:
        found = find_inputs([name for name in inputs if name != "-"], args.format)
        if "-" in inputs or not found.files:
            raise DataError("--train reads its input twice: it needs files, not the standard input")
        if found.ignored and output is None:
            _print_notice(f"ignored {len(found.ignored):,} file(s) of unknown format: {name_some(found.ignored)}")
        train_bpe(sample_texts(found.files, text, args.train_bytes), args.train, args.tokenizer)
        print(f"{args.tokenizer}: trained, {args.train} ids")
    if output is not None:
        if as_internevo:
            _print_internevo_notices(args.raw_json)
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
            _print_notice(notice)
        ratio = f", {result.num_bytes / result.tokens:.2f} bytes of input per token" if result.tokens else ""
        print(
            f"{output}: {result.documents:,} documents, {result.tokens:,} tokens{ratio}, "
            f"{result.megabytes_per_second:.1f} MB/s"
        )


def _print_notice(notice: str) -> None:
    print(f"notice: {notice}", file=sys.stderr)


def _print_internevo_notices(raw_json: bool) -> None:
    """Tell what InternEvo's options imply, and where this tool differs from InternEvo's."""
    _print_notice(
        "like InternEvo's tool, this starts documents with bos, ends them with eos (disable: --no-bos, --no-eos) and "
        "strips the lines of txt files"
    )
    if not raw_json:
        _print_notice(
            "only the text of JSON records is tokenized; InternEvo's tool includes braces and keys (as --raw-json does)"
        )


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
        help="inputs, tokenized to the ids of InternEvo's tool",
    )
    parser.add_argument(
        "--tokenizer",
        "--tokenizer_path",
        "--tokenizer-path",
        type=local_path,
        help="a tokenizer.json, a Hugging Face tokenizer folder, or a SentencePiece .model; with --train, where to "
        "write the tokenizer.json",
    )
    parser.add_argument("--output", type=local_path, help="the .bin file to write")
    parser.add_argument(
        "--bin_output_path", "--bin-output-path", type=local_path, help="--output, with the ids of InternEvo's tool"
    )
    parser.add_argument("--append", action="store_true", help="append to an existing output")
    parser.add_argument("--text-key", default="text", help="field or column with the text (default: text)")
    parser.add_argument("--raw-json", action="store_true", help="tokenize the JSON of a record, not only its text")
    parser.add_argument("--whole-files", action="store_true", help="a txt file is one document (default: one a line)")
    parser.add_argument("--format", choices=FORMATS, help="format of inputs with an unknown suffix")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="start every document with the bos token (default: no; with InternEvo's options, if there is one)",
    )
    parser.add_argument(
        "--eos",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="end every document with the eos token (default: if the tokenizer has one)",
    )
    parser.add_argument("--valid-fraction", type=float, default=0.0, help="share of documents for --valid-output")
    parser.add_argument("--valid-output", type=local_path, help="the .bin file of the validation documents")
    parser.add_argument("--restart", action="store_true", help="discard the parts of an interrupted run")
    parser.add_argument("--trust-remote-code", action="store_true", help="run custom code of the tokenizer folder")
    parser.add_argument(
        "--train", type=int, metavar="VOCAB", help="train a byte-level BPE tokenizer of this size first"
    )
    parser.add_argument(
        "--train-bytes",
        type=float,
        default=1e8,
        help="bytes of text to train it on (default: 1e8, about 2 GB of memory)",
    )
    parser.add_argument("--rebuild-meta", type=local_path, metavar="BIN", help="rebuild the .meta of a .bin file")
    return parser
