"""`internlm generate`: continues prompts with a trained model. Text is streamed to stdout, the log goes to stderr."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internlm.apis.generation import GenerativeModel, NonFiniteError, check_choices, generate
from internlm.apis.text_stream import StopTexts, TextStream
from internlm.checkpoint.data_tokenizer import KnownTokenizer, trained_with
from internlm.checkpoint.load_model import load_model_for_inference
from internlm.checkpoint.save_folder import resolve
from internlm.commands.prompt_images import read_prompt_images, with_placeholders
from internlm.convert.tokenizer_files import generation_eos_ids
from internlm.data.packing.image_placeholders import IMAGE_FEATURES, image_feature_indices
from internlm.data.tokenize.fingerprint import same_ids, tokenizer_fingerprint
from internlm.data.tokenize.special_tokens import stop_ids
from internlm.data.tokenize.text_tokenizer import TextTokenizer, load_tokenizer
from internlm.utils.errors import CheckpointError, ConfigError, nearest
from internlm.utils.logging import configure_logging, get_logger
from internlm.utils.paths import local_path, path_text
from internlm.utils.storage import StoragePath, storage_path

logger = get_logger(__name__)

DEFAULT_SEED = 1024
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--ckpt", required=True, type=path_text, metavar="DIR", help="checkpoint, or a folder of them (newest)"
    )
    parser.add_argument("--prompt", required=True, action="append", metavar="TEXT", help="text to continue; repeatable")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        type=local_path,
        metavar="FILE",
        help="picture for the next <image> in the prompts; repeatable",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=100, metavar="N", help="maximum tokens to append (default: 100)"
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
        "--seed", type=int, default=DEFAULT_SEED, metavar="S", help=f"seed of the sampling (default: {DEFAULT_SEED})"
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
        "--bos",
        action="store_true",
        help="prepend the beginning-of-text token, for models whose training documents begin with it",
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
        "--stop", action="append", default=[], metavar="TEXT", help="end the output before this text; repeatable"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a tokenizer that exists only as code"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available, else cpu)")


def run(args: argparse.Namespace) -> int:
    """Print each prompt and its continuation; returns the exit code."""
    configure_logging()
    check_choices(args.max_new_tokens, not args.greedy, args.temperature, args.top_k, args.top_p)
    for prompt in args.prompt:
        check_text(prompt, "--prompt")
    if not MIN_SEED <= args.seed <= MAX_SEED - len(args.prompt):
        raise ConfigError(f"--seed {args.seed}: must be from {MIN_SEED} to {MAX_SEED - len(args.prompt)}")
    if "" in args.stop:
        raise ConfigError("--stop: the text must not be empty")
    device = choose_device(args.device)
    model, config = load_model_for_inference(args.ckpt, device)
    if config.model.is_reward:
        raise ConfigError(f"{args.ckpt}: a reward model returns scores and cannot generate text")
    if not isinstance(model, GenerativeModel):
        raise ConfigError(
            f"{args.ckpt}: model type '{config.model_type}' lacks `logits` or `make_cache`, which generation needs"
        )
    tokenizer_path = args.tokenizer or config.data.tokenizer_path
    if tokenizer_path is None:
        raise ConfigError("the run's config has no data.tokenizer_path; give --tokenizer PATH")
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=args.trust_remote_code)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{tokenizer_path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config.model.vocab_size}; give the --tokenizer that made the training data"
        )
    checkpoint = resolve(storage_path(args.ckpt))
    if not args.other_tokenizer:
        check_tokenizer(checkpoint, tokenizer, str(tokenizer_path))
    eos_ids = end_ids(args.eos, tokenizer, checkpoint, Path(tokenizer_path))
    assert isinstance(model, nn.Module)
    images = read_prompt_images([Path(each) for each in args.image], args.prompt, model, config, checkpoint)
    tokenizer = with_placeholders(tokenizer, model, config)
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
                images=images[number],
                image_token_id=config.model.image_token_id,
                with_bos=args.bos,
                eos_ids=eos_ids,
                stops=args.stop,
                max_new_tokens=args.max_new_tokens,
                do_sample=not args.greedy,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                # A seed per prompt makes its text independent of the prompts before it; a repeated prompt differs.
                seed=args.seed + number,
                device=device,
            )
        except NonFiniteError as error:
            print(flush=True)
            raise CheckpointError(f"{args.ckpt}: {error}; {where_not_finite(model)}") from error
        print(flush=True)
    return 0


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


def where_not_finite(model: GenerativeModel) -> str:
    """Describe the first weight with non-finite values."""
    assert isinstance(model, nn.Module)
    for name, parameter in model.named_parameters():
        bad = int((~parameter.isfinite()).sum())
        if bad:
            return f"{bad:,} of the {parameter.numel():,} elements of {name} are inf or NaN"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"all weights are finite, so the activations overflow {dtype}"


def continue_prompt(
    model: GenerativeModel,
    tokenizer: TextTokenizer,
    prompt: str,
    show: Callable[[str], None],
    *,
    images: Tensor | None = None,
    image_token_id: int | None = None,
    with_bos: bool,
    eos_ids: Sequence[int],
    stops: Sequence[str],
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    device: torch.device,
) -> str:
    """Continue one prompt until an end token, a stop text or `max_new_tokens`.

    Args not listed are those of `generate`.

    Args:
        show: called with each piece of new text; pieces never split a character.
        images: pictures of the prompt, float32 `[N, 3, H, W]`; None: it has none.
        image_token_id: the placeholder that `tokenizer` puts in place of pictures.
        with_bos: prepend the tokenizer's beginning-of-text token to the prompt.
        eos_ids: tokens that end the text; they are not shown.
        stops: texts that end the text; neither they nor what follows is shown.

    Returns:
        The new text, without the prompt.

    Raises:
        ConfigError: the prompt is empty, the tokenizer has no beginning-of-text token, or an argument is invalid.
    """
    prompt_ids = tokenizer.encode_batch([prompt])[0]
    if with_bos:
        if tokenizer.bos_id is None:
            raise ConfigError("--bos: this tokenizer has no beginning-of-text token")
        prompt_ids = [tokenizer.bos_id, *prompt_ids]
    if not prompt_ids:
        raise ConfigError("the prompt is empty, which only works with --bos")
    stream, until = TextStream(tokenizer.decode, prompt_ids), StopTexts(stops)
    pieces: list[str] = []

    def take(piece: str) -> None:
        if piece:
            pieces.append(piece)
            show(piece)

    def on_token(tokens: torch.Tensor) -> bool:
        token = int(tokens[0])
        if token not in eos_ids:
            take(until.push(stream.push(token)))
        return until.found

    input_ids = torch.tensor([prompt_ids], device=device)
    prompt_inputs: dict[str, Any] = {}
    if images is not None and image_token_id is not None:
        tokens_per_image = prompt_ids.count(image_token_id) // len(images)
        indices = image_feature_indices(input_ids, image_token_id, tokens_per_image, len(images))
        prompt_inputs = {"images": images.to(device), "extra": {IMAGE_FEATURES: indices}}
        input_ids = input_ids.masked_fill(indices >= 0, 0)
    generate(
        model,
        input_ids,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token_id=eos_ids,
        num_tokens=tokenizer.vocab_size,
        generator=torch.Generator(device).manual_seed(seed),
        on_token=on_token,
        prompt_inputs=prompt_inputs,
    )
    take(until.push(stream.finish()))
    take(until.finish())
    return "".join(pieces)


def check_tokenizer(checkpoint: StoragePath, tokenizer: TextTokenizer, where: str) -> None:
    """Refuse a tokenizer that gives other ids than that of the training data.

    Raises:
        ConfigError: the ids differ.
    """
    known = trained_with(checkpoint)
    if known is None:
        return
    given = KnownTokenizer(tokenizer_fingerprint(tokenizer), where, tokenizer.vocab_size)
    if not same_ids(known.fingerprint, given.fingerprint):
        raise ConfigError(
            f"'{checkpoint}' was trained on the ids of another tokenizer: {known.against(given)}. Give that one with "
            "--tokenizer, or use this one anyway with --other-tokenizer"
        )


def end_ids(
    given: Sequence[str], tokenizer: TextTokenizer, checkpoint: StoragePath, tokenizer_path: Path
) -> tuple[int, ...]:
    """The tokens that end a text: the given ones, else the tokenizer's and those of a generation config.

    Args:
        given: ids or spellings of tokens.
        tokenizer: of the model.
        checkpoint: has a generation config if it descends from an imported folder.
        tokenizer_path: searched for a generation config, too.

    Raises:
        ConfigError: a given token does not exist.
    """
    if given:
        pieces = tokenizer.pieces()
        ids = []
        for name in given:
            if name in pieces and name:
                ids.append(pieces.index(name))
            elif name.isdecimal() and int(name) < tokenizer.vocab_size:
                ids.append(int(name))
            else:
                raise ConfigError(
                    f"--eos {name}: the tokenizer has no such token, and ids end at {tokenizer.vocab_size - 1}"
                    f"{nearest(name, [pieces[id] for id in tokenizer.special_ids])}"
                )
        return tuple(dict.fromkeys(ids))
    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    configured = generation_eos_ids(checkpoint) or stop_ids(folder)
    of_tokenizer = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return tuple(dict.fromkeys((*of_tokenizer, *configured)))


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without a name, a GPU if there is one, else the CPU.

    Raises:
        ConfigError: the device is unknown to torch or not available on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from error
    if device.type == "meta":
        raise ConfigError("--device meta: it has no storage to compute with")
    return device
