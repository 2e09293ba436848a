"""`internlm generate`: continue prompts with a trained model. Text goes to stdout as it grows, the log to stderr."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from internlm.apis.generation import GenerativeModel, NonFiniteError, check_choices, generate
from internlm.apis.text_stream import TextStream
from internlm.checkpoint.inference import load_model_for_inference
from internlm.data.tokenize.text_tokenizer import TextTokenizer, load_tokenizer
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.logging import configure_logging, get_logger
from internlm.utils.paths import local_path, path_text

logger = get_logger(__name__)

DEFAULT_SEED = 1024
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--ckpt", required=True, type=path_text, metavar="DIR", help="checkpoint, or a folder of them (newest)"
    )
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="may be given many times")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="tokens to append (default: 100)")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of drawing one")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="below 1 sharpens (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest (default: 0, all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that reach P (default: 1, all)"
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, metavar="S", help=f"of the draws (default: {DEFAULT_SEED})"
    )
    parser.add_argument(
        "--tokenizer",
        type=local_path,
        metavar="PATH",
        help="tokenizer.json, SentencePiece .model or Hugging Face folder (default: data.tokenizer_path of the run)",
    )
    parser.add_argument(
        "--bos",
        action="store_true",
        help="put the beginning-of-text token first, for models whose training documents begin with it",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    """Print each prompt and its continuation; returns the exit code."""
    configure_logging()
    check_choices(args.max_new_tokens, not args.greedy, args.temperature, args.top_k, args.top_p)
    for prompt in args.prompt:
        check_text(prompt, "--prompt")
    if not MIN_SEED <= args.seed <= MAX_SEED - len(args.prompt):
        raise ConfigError(f"--seed {args.seed}: must be from {MIN_SEED} to {MAX_SEED - len(args.prompt)}")
    device = choose_device(args.device)
    model, config = load_model_for_inference(args.ckpt, device)
    if config.model.is_reward:
        raise ConfigError(f"{args.ckpt}: a reward model gives scores, it does not generate text")
    if not isinstance(model, GenerativeModel):
        raise ConfigError(
            f"{args.ckpt}: model type '{config.model_type}' lacks `logits` or `make_cache`, which generating needs"
        )
    tokenizer_path = args.tokenizer or config.data.tokenizer_path
    if tokenizer_path is None:
        raise ConfigError("the run's config has no data.tokenizer_path; give --tokenizer PATH")
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{tokenizer_path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config.model.vocab_size}; give the --tokenizer that made the training data"
        )
    for number, prompt in enumerate(args.prompt):
        if number:
            print()
        print(prompt, end="", flush=True)
        try:
            continue_prompt(
                model,
                tokenizer,
                prompt,
                lambda piece: print(piece, end="", flush=True),
                with_bos=args.bos,
                max_new_tokens=args.max_new_tokens,
                do_sample=not args.greedy,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                # Draws of its own for each prompt: its text does not hang on those before, and a prompt can be given
                # twice.
                seed=args.seed + number,
                device=device,
            )
        except NonFiniteError as error:
            print(flush=True)
            raise CheckpointError(f"{args.ckpt}: {error}; {where_not_finite(model)}") from error
        print(flush=True)
    return 0


def check_text(text: str, option: str) -> None:
    """Refuse text of the command line that is not UTF-8.

    Raises:
        ConfigError: naming the first byte that is not.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # Python reads such a byte as a lone surrogate.
        byte = ord(text[error.start]) & 0xFF
        raise ConfigError(
            f"{option}: not UTF-8: byte 0x{byte:02x} behind {text[: error.start][-20:]!r}; convert the text, "
            f"for example with iconv -t UTF-8"
        ) from None


def where_not_finite(model: GenerativeModel) -> str:
    """The first weight that is not finite, in words."""
    assert isinstance(model, nn.Module)
    for name, parameter in model.named_parameters():
        bad = int((~parameter.isfinite()).sum())
        if bad:
            return f"{bad:,} of the {parameter.numel():,} numbers of {name} are inf or NaN"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"all weights are finite, so the activations leave the range of {dtype}"


def continue_prompt(
    model: GenerativeModel,
    tokenizer: TextTokenizer,
    prompt: str,
    show: Callable[[str], None],
    *,
    with_bos: bool,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    device: torch.device,
) -> str:
    """Continue one prompt until its end-of-text token or `max_new_tokens`; the other arguments are those of `generate`.

    Args:
        show: called with each piece of new text; pieces never break a character.
        with_bos: put the tokenizer's beginning-of-text token before the prompt.

    Returns:
        The new text, without the prompt.

    Raises:
        ConfigError: nothing to start from, no such token, or a bad argument.
    """
    prompt_ids = tokenizer.encode_batch([prompt])[0]
    if with_bos:
        if tokenizer.bos_id is None:
            raise ConfigError("--bos: this tokenizer names no beginning-of-text token")
        prompt_ids = [tokenizer.bos_id, *prompt_ids]
    if not prompt_ids:
        raise ConfigError("the prompt is empty; a text can start from nothing only with --bos")
    eos_id = tokenizer.eos_id
    stream = TextStream(tokenizer.decode, prompt_ids)
    pieces: list[str] = []

    def take(piece: str) -> None:
        if piece:
            pieces.append(piece)
            show(piece)

    def on_token(tokens: torch.Tensor) -> None:
        token = int(tokens[0])
        if token != eos_id:
            take(stream.push(token))

    generate(
        model,
        torch.tensor([prompt_ids], device=device),
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=eos_id,
        num_tokens=tokenizer.vocab_size,
        generator=torch.Generator(device).manual_seed(seed),
        on_token=on_token,
    )
    take(stream.finish())
    return "".join(pieces)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; a GPU where there is one if no name is given.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from error
    if device.type == "meta":
        raise ConfigError("--device meta: it has no numbers to compute with")
    return device
