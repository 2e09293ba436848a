"""The options of commands that answer with a trained model: which checkpoint and tokenizer, how tokens are chosen."""

from __future__ import annotations

import argparse
import re

from internlm.apis.sampling import Sampling
from internlm.serve.language_model import LanguageModel, load_language_model
from internlm.utils.errors import ConfigError
from internlm.utils.paths import local_path, path_text

DEFAULT_SEED = 1024


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare which model answers."""
    parser.add_argument(
        "--ckpt",
        required=True,
        type=path_text,
        metavar="DIR",
        help="checkpoint, folder of checkpoints or of a run (newest), or Hugging Face folder",
    )
    parser.add_argument(
        "--tokenizer",
        type=local_path,
        metavar="PATH",
        help="tokenizer.json, SentencePiece .model or Hugging Face folder (default: data.tokenizer_path of the run)",
    )
    parser.add_argument(
        "--other-tokenizer",
        action="store_true",
        help="allow a tokenizer that differs from that of the training data",
    )
    parser.add_argument(
        "--eos",
        action="append",
        default=[],
        metavar="ID|TOKEN",
        help="token that ends a text, by id or spelling; repeatable (default: the tokenizer's, and those of "
        "generation_config.json)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a tokenizer that exists only as code"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available, else cpu)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Declare how tokens are chosen."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=100, metavar="N", help="maximum tokens to append (default: 100)"
    )
    parser.add_argument(
        "--min-new-tokens", type=int, default=0, metavar="N", help="tokens before which no text ends (default: 0)"
    )
    parser.add_argument("--greedy", action="store_true", help="take the most likely token instead of sampling")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="below 1 sharpens the distribution (default: 1)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens (default: 0, all)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the nucleus of probability P (default: 1)"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="drop tokens less likely than P times the likeliest (default: 0, none)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="F",
        help="above 1 makes tokens of the prompt and the text less likely (default: 1)",
    )
    parser.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="F",
        help="subtracted from the logits of tokens that the new text has (default: 0)",
    )
    parser.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="F",
        help="subtracted once for each time that the new text has the token (default: 0)",
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, metavar="S", help=f"seed of the sampling (default: {DEFAULT_SEED})"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the output before this text; repeatable"
    )


def load_model(args: argparse.Namespace) -> LanguageModel:
    """The model of `add_model_options`; raises what `load_language_model` raises."""
    return load_language_model(
        args.ckpt,
        tokenizer_path=args.tokenizer,
        is_other_tokenizer=args.other_tokenizer,
        trust_remote_code=args.trust_remote_code,
        eos=args.eos,
        device=args.device,
    )


def read_sampling(
    args: argparse.Namespace,
    *,
    eos_ids: tuple[int, ...] = (),
    num_tokens: int | None = None,
    logprobs: int | None = None,
) -> Sampling:
    """The settings of `add_sampling_options`.

    Args:
        args: parsed options.
        eos_ids, num_tokens: of the model, see `Sampling`.
        logprobs: see `Sampling.top_logprobs`.

    Raises:
        ConfigError: lists all invalid options.
    """
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        do_sample=not args.greedy,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        eos_ids=eos_ids,
        num_tokens=num_tokens,
        top_logprobs=logprobs,
        seed=args.seed,
    )
    problems = sampling.problems()
    if problems:
        raise ConfigError([_with_options(problem) for problem in problems])
    return sampling


def _with_options(problem: str) -> str:
    """A problem of `Sampling` that names options in place of fields."""

    def option(found: re.Match[str]) -> str:
        name = found[1].replace("_", "-")
        return f"--{'logprobs' if name == 'top-logprobs' else name} "

    return re.sub(r"\b([a-z]+(?:_[a-z]+)*) = ", option, problem)
