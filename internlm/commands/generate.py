"""`internlm generate`: continues prompts with a trained model. Text is streamed to stdout, the log goes to stderr."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from torch import nn

from internlm.apis.engine import NonFiniteError, Prompt, Text
from internlm.apis.generation import DEFAULT_ROWS, generate
from internlm.apis.sampling import MAX_SEED, Sampling
from internlm.commands.generate_rows import best_beams, output_file, write_rows
from internlm.commands.model_options import add_model_options, add_sampling_options, load_model, read_sampling
from internlm.serve.language_model import LanguageModel
from internlm.serve.prompt_images import image_prompt, read_prompt_images
from internlm.serve.prompt_rows import PromptRow, read_prompt_rows
from internlm.serve.readable_text import ReadableText
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.logging import configure_logging, get_logger
from internlm.utils.paths import local_path

logger = get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_options(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; repeatable")
    parser.add_argument(
        "--prompts",
        type=local_path,
        metavar="FILE",
        help='JSON lines with the prompts: {"prompt": TEXT or list of token ids, ...}; other fields are copied',
    )
    parser.add_argument(
        "--output",
        type=local_path,
        metavar="FILE",
        help="write JSON lines here instead of text to stdout; not overwritten (default with --prompts: stdout)",
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        type=local_path,
        metavar="FILE",
        help="picture for the next <image> in the prompts; repeatable",
    )
    add_sampling_options(parser)
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    parser.add_argument(
        "--beams",
        type=int,
        default=1,
        metavar="N",
        help="beam search with this many texts at a time (default: 1, none)",
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="F",
        help="exponent of the length in the score of a beam; above 0 longer texts gain (default: 1)",
    )
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        help="write log-probabilities: of each token, and the K likeliest in its place",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=DEFAULT_ROWS,
        metavar="N",
        help=f"texts of a file that are computed at a time (default: {DEFAULT_ROWS})",
    )
    parser.add_argument(
        "--bos",
        action="store_true",
        help="prepend the beginning-of-text token, for models whose training documents begin with it",
    )


def run(args: argparse.Namespace) -> int:
    """Print each prompt and its continuation, or write JSON lines; returns the exit code."""
    configure_logging()
    _check(args)
    rows = [PromptRow(prompt, {"prompt": prompt}, "--prompt") for prompt in args.prompt]
    if args.prompts is not None:
        rows += read_prompt_rows(args.prompts)
    if not args.greedy and not args.seed <= MAX_SEED - len(rows) * args.samples:
        raise ConfigError(f"--seed {args.seed}: must be at most {MAX_SEED - len(rows) * args.samples}")
    language = load_model(args)
    sampling = read_sampling(
        args, eos_ids=language.eos_ids, num_tokens=language.tokenizer.vocab_size, logprobs=args.logprobs
    )
    prompts = _prompts(language, rows, args)
    try:
        if args.prompts is not None or args.output is not None:
            with output_file(args.output) as output:
                write_rows(language, rows, prompts, sampling, args, output)
        else:
            _print_texts(language, rows, prompts, sampling, args)
    except NonFiniteError as error:
        print(flush=True)
        raise CheckpointError(f"{args.ckpt}: {error}; {language.where_not_finite()}") from error
    return 0


def _check(args: argparse.Namespace) -> None:
    read_sampling(args, logprobs=args.logprobs)
    problems = []
    if not args.prompt and args.prompts is None:
        problems.append("give --prompt TEXT or --prompts FILE")
    if "" in args.stop:
        problems.append("--stop: the text must not be empty")
    for name in ("samples", "beams", "batch"):
        if getattr(args, name) < 1:
            problems.append(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.beams == 1 and args.length_penalty != 1.0:
        problems.append("--length-penalty has no effect without --beams; remove it")
    if args.beams > 1 and args.stop:
        problems.append("--stop does not work with --beams, which compare whole texts; remove one of them")
    if args.beams > 1 and args.logprobs is not None:
        problems.append("--logprobs does not work with --beams, whose texts have scores; remove one of them")
    if args.beams > 1 and args.samples > args.beams:
        problems.append(f"--samples {args.samples}: must be at most --beams {args.beams}")
    if args.beams == 1 and args.samples > 1 and args.greedy:
        problems.append("--samples: greedy texts of one prompt are all the same; remove --greedy, or add --beams")
    if args.logprobs is not None and args.prompts is None and args.output is None:
        problems.append("--logprobs are written to JSON lines only: add --output FILE")
    if args.batch != DEFAULT_ROWS and args.prompts is None and args.output is None:
        problems.append("--batch has no effect on texts that are streamed to stdout; remove it")
    if args.output is not None and args.output.exists():
        problems.append(f"--output {args.output}: exists; give another file, or remove it")
    elif args.output is not None and not args.output.parent.is_dir():
        problems.append(f"--output {args.output}: its folder does not exist; create it, or give another file")
    for text in args.prompt:
        try:
            check_text(text, "--prompt")
        except ConfigError as error:
            problems += error.mistakes
    if problems:
        raise ConfigError(problems)


def check_text(text: str, option: str) -> None:
    """Refuse command-line text that is not UTF-8.

    Raises:
        ConfigError: the message names the first invalid byte.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # Python decodes such a byte to a lone surrogate.
        byte = ord(text[error.start]) & 0xFF
        raise ConfigError(
            f"{option}: not UTF-8: byte 0x{byte:02x} after {text[: error.start][-20:]!r}; convert the text, "
            f"for example with iconv -t UTF-8"
        ) from None


def _prompts(language: LanguageModel, rows: list[PromptRow], args: argparse.Namespace) -> list[Prompt]:
    """The prompts in tokens, with their pictures."""
    texts = [row.prompt if isinstance(row.prompt, str) else "" for row in rows]
    model = language.model
    assert isinstance(model, nn.Module)
    paths = [Path(each) for each in args.image]
    images = read_prompt_images(paths, texts, model, language.config, language.checkpoint)
    prompts = []
    for row, pictures in zip(rows, images, strict=True):
        if isinstance(row.prompt, str):
            try:
                ids = language.encode(row.prompt, with_bos=args.bos)
            except ConfigError as error:
                raise ConfigError([f"{row.place}: {mistake}" for mistake in error.mistakes]) from None
        else:
            ids = row.prompt
            limit = language.config.model.vocab_size
            if not all(0 <= id < limit for id in ids):
                raise ConfigError(f"{row.place}: token ids must be from 0 to {limit - 1}")
        prompts.append(image_prompt(ids, pictures, language.config.model.image_token_id, language.device))
    return prompts


def _print_texts(
    language: LanguageModel, rows: list[PromptRow], prompts: list[Prompt], sampling: Sampling, args: argparse.Namespace
) -> None:
    """Print prompts and texts one after the other, as they come."""
    is_first = True
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        # A seed per text makes it independent of those before it.
        own = replace(sampling, seed=sampling.seed + number * args.samples)
        if args.beams > 1:
            for text, _ in best_beams(language, prompt, own, args):
                print("" if is_first else "\n", row.prompt, text, sep="", flush=True)
                is_first = False
            continue
        for sample in range(args.samples):
            print("" if is_first else "\n", row.prompt, sep="", end="", flush=True)
            is_first = False
            readers: dict[int, ReadableText] = {}

            def show(text: Text, readers: dict[int, ReadableText] = readers) -> bool:
                reader = readers.setdefault(0, ReadableText(text, language.tokenizer, args.stop))
                print(reader.read(), end="", flush=True)
                return reader.is_stopped

            generate(language.model, [prompt], replace(own, seed=own.seed + sample), on_token=show)
            print(flush=True)
