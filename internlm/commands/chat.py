"""`internlm chat`: talks with a trained model in the terminal, by the chat template of its tokenizer."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from internlm.apis.engine import NonFiniteError, Text
from internlm.apis.generation import generate
from internlm.commands.model_options import add_model_options, add_sampling_options, load_model, read_sampling
from internlm.data.conversations.row_forms import Message
from internlm.serve.readable_text import ReadableText
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.logging import configure_logging
from internlm.utils.paths import local_path

HELP = "an empty line or end of input leaves, /reset forgets the conversation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_options(parser)
    parser.add_argument(
        "--chat-template", type=local_path, metavar="FILE", help="Jinja template (default: that of the tokenizer)"
    )
    parser.add_argument("--system", metavar="TEXT", help="first message, of the system")
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int:
    """Answer the lines of stdin until the end of input; returns the exit code."""
    configure_logging()
    read_sampling(args)
    if "" in args.stop:
        raise ConfigError("--stop: the text must not be empty")
    language = load_model(args)
    template = language.chat_template(args.chat_template)
    sampling = read_sampling(args, eos_ids=language.eos_ids, num_tokens=language.tokenizer.vocab_size)
    start: list[Message] = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(start)
    longest = language.config.data.seq_len
    print(f"{args.ckpt}: {HELP}", file=sys.stderr)
    while True:
        line = _read_line()
        if not line:
            return 0
        if line == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        ids = language.encode_chat(template, messages)
        if len(ids) + sampling.max_new_tokens > longest:
            print(
                f"the conversation is {len(ids)} tokens: with the answer it may be longer than the {longest} tokens "
                "that the model was trained with; /reset forgets it",
                file=sys.stderr,
            )
        readers: list[ReadableText] = []

        def show(text: Text, readers: list[ReadableText] = readers) -> bool:
            if not readers:
                readers.append(ReadableText(text, language.tokenizer, args.stop))
            print(readers[0].read(), end="", flush=True)
            return readers[0].is_stopped

        try:
            generate(language.model, [ids], sampling, on_token=show)
        except NonFiniteError as error:
            print(flush=True)
            raise CheckpointError(f"{args.ckpt}: {error}; {language.where_not_finite()}") from error
        except KeyboardInterrupt:
            print(" (interrupted)", file=sys.stderr)
        print(flush=True)
        messages.append({"role": "assistant", "content": readers[0].shown if readers else ""})
        sampling = replace(sampling, seed=sampling.seed + 1)


def _read_line() -> str:
    """The next line of the user without its end; empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""
