"""The command lines of tools/tokenizer.py and `internlm data tokenize`: parse, call, print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from internlm.data.conversations.answer_spans import LEARN, MASK_METHODS
from internlm.data.conversations.encoder import ConversationOptions
from internlm.data.conversations.row_forms import FORMS
from internlm.data.images.settings import IMAGE_MARKER, ImageSettings
from internlm.data.tokenize.input_files import FORMATS, find_inputs, name_some
from internlm.data.tokenize.pipeline import ON_BAD_DATA, TokenizeOptions, tokenize
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
    return run_tokenize(_parser().parse_args(arguments))


def run_tokenize(args: argparse.Namespace) -> int:
    """Tokenize with the options of `add_tokenize_options`; returns the exit code.

    Raises:
        UserError: an option or the data is invalid.
    """
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
    conversations, images = _conversations(args), _images(args)
    if conversations is not None and images is not None:
        conversations = replace(conversations, image_marker=IMAGE_MARKER)
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
            conversations=conversations,
            images=images,
            on_bad_data=args.on_bad_data,
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


def _conversations(args: argparse.Namespace) -> ConversationOptions | None:
    """The options of conversations; None for texts.

    Raises:
        DataError: an option of conversations is given without --conversations, or one of texts with it.
    """
    # None where an option is not given, so that it can be told from its default.
    given = {"learn": args.learn, "mask": args.mask, "chat_template": args.chat_template}
    given = {name: value for name, value in given.items() if value is not None}
    if args.conversations is None:
        if names := [f"--{name.replace('_', '-')}" for name in given]:
            raise DataError(f"{', '.join(names)} belongs to conversations: add --conversations")
        return None
    for is_given, name in (
        (args.raw_json, "--raw-json"),
        (args.whole_files, "--whole-files"),
        (args.train is not None, "--train"),
    ):
        if is_given:
            raise DataError(f"{name} belongs to texts: drop it, or drop --conversations")
    if "chat_template" in given:
        given["chat_template"] = str(given["chat_template"])
    return ConversationOptions(form=None if args.conversations == "auto" else args.conversations, **given)


def _images(args: argparse.Namespace) -> ImageSettings | None:
    """The options of pictures; None without.

    Raises:
        DataError: some of them are missing, or they are given without --conversations.
    """
    needed = {"--image-token-id": args.image_token_id, "--tokens-per-image": args.tokens_per_image}
    optional = {"--image-folder": args.image_folder, "--image-column": args.image_column}
    given = [name for name, value in (needed | optional).items() if value is not None]
    if not given:
        return None
    if args.conversations is None:
        raise DataError(f"{', '.join(given)}: only conversations have pictures: add --conversations")
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise DataError(
            f"{given[0]} needs {' and '.join(missing)}, as model.image_token_id and the patches of a picture"
        )
    for name, value in needed.items():
        if value < 1:
            raise DataError(f"{name} {value}: must be at least 1")
    folder = args.image_folder
    if folder is not None and not folder.is_dir():
        raise DataError(f"--image-folder {folder}: no such folder")
    # The length of a sequence is not known yet: training leaves out what is longer.
    return ImageSettings(
        args.image_token_id,
        args.tokens_per_image,
        seq_len=sys.maxsize,
        folder=None if folder is None else folder.absolute(),
        column=args.image_column,
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
    add_tokenize_options(parser)
    parser.add_argument(
        "--text_input_path",
        "--text-input-path",
        nargs="+",
        type=path_text,
        help="inputs, tokenized to the ids of InternEvo's tool",
    )
    parser.add_argument(
        "--bin_output_path", "--bin-output-path", type=local_path, help="--output, with the ids of InternEvo's tool"
    )
    return parser


def add_tokenize_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options, except those of InternEvo's tool."""
    parser.set_defaults(text_input_path=None, bin_output_path=None)
    parser.add_argument(
        "inputs",
        nargs="*",
        type=path_text,
        help="txt, json, jsonl (ndjson) and parquet files, plain or compressed (gz, bz2, xz, zst), folders of them, or "
        "- for stdin",
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
    _add_conversation_options(parser)
    _add_image_options(parser)


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures of conversations, which have <image> in their text")
    group.add_argument("--image-token-id", type=int, metavar="ID", help="the placeholder, model.image_token_id")
    group.add_argument(
        "--tokens-per-image", type=int, metavar="N", help="placeholders of a picture: (image_size / patch_size)^2"
    )
    group.add_argument(
        "--image-folder", type=local_path, metavar="DIR", help="folder that paths of pictures are relative to"
    )
    group.add_argument(
        "--image-column", metavar="NAME", help="column with the pictures of a row (default: image or images)"
    )


def _add_conversation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversations (json, jsonl and parquet)")
    group.add_argument(
        "--conversations",
        nargs="?",
        const="auto",
        choices=("auto", *FORMS),
        help="tokenize rows of messages, prompts and answers; the form (default: detected from the columns)",
    )
    group.add_argument("--learn", choices=LEARN, help="answers with loss (default: all)")
    group.add_argument(
        "--mask",
        choices=MASK_METHODS,
        help="find answers by the {%% generation %%} marks of the template, or by prefixes (default: auto, by marks if "
        "there are any)",
    )
    group.add_argument(
        "--chat-template", type=local_path, metavar="FILE", help="a Jinja template (default: the tokenizer's)"
    )
    group.add_argument(
        "--on-bad-data",
        choices=ON_BAD_DATA,
        default="stop",
        help="stop at a row that cannot be used, or skip and count it (default: stop)",
    )
