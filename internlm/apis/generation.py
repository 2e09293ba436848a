"""Autoregressive generation with a key-value cache: the loop over tokens and the sampling of the next one.

Works on token ids and knows neither tokenizers nor checkpoints.

Shapes: B prompts, S prompt tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from internlm.utils.errors import ConfigError, UserError

MIN_TEMPERATURE = 1e-6
"""Dividing logits by a smaller temperature would overflow fp32."""


class NonFiniteError(UserError):
    """The weights or the logits contain inf or NaN."""


class Cache(Protocol):
    """Keys and values of all tokens so far; opaque to generation."""


@runtime_checkable
class GenerativeModel(Protocol):
    """The interface that generation needs of a model; every decoder of `internlm.model` implements it."""

    training: bool

    def __call__(self, input_ids: Tensor, position_ids: Tensor, *, cache: Cache, **inputs: Any) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def make_cache(self, batch_size: int, max_length: int) -> Cache: ...

    def train(self, mode: bool = True) -> object: ...


@torch.no_grad()
def generate(
    model: GenerativeModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    num_tokens: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], bool | None] | None = None,
    prompt_inputs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Continue a batch of prompts of equal length.

    Args:
        model: a decoder; it is in evaluation mode during the call.
        input_ids: int64 `[B, S]` on the model's device, without padding; prompts of different lengths need a call each.
        max_new_tokens: maximum number of tokens to append.
        do_sample: sample the next token; otherwise take the most likely one, and the next three arguments must keep
            their defaults.
        temperature: see `filter_logits`.
        top_k: see `filter_logits`.
        top_p: see `filter_logits`.
        eos_token_id: tokens that end a text. Ended texts are padded with the first of them.
        num_tokens: ids from this one on (the padding of the vocabulary) are never chosen; None allows all ids.
        generator: source of randomness, on the model's device; None is torch's default generator.
        on_token: called with the int64 `[B]` tokens of each step as soon as they are known; returning True ends all
            texts.
        prompt_inputs: further arguments of the model with the prompts, such as `images` and `extra` of a LLaVA.

    Returns:
        int64 `[B, S + n]`, prompts and continuations, n <= max_new_tokens.

    Raises:
        ConfigError: an argument is invalid.
        NonFiniteError: the model returns inf or NaN.
    """
    check_choices(max_new_tokens, do_sample, temperature, top_k, top_p)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0 or input_ids.dtype != torch.int64:
        shape = list(input_ids.shape)
        raise ConfigError(f"input_ids: must be int64 [prompts, tokens >= 1], got {input_ids.dtype} {shape}")
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    batch_size, prompt_length = input_ids.shape
    device = input_ids.device
    ends = torch.tensor(eos, dtype=torch.int64, device=device)
    finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
    tokens = [input_ids]
    new = input_ids
    inputs = dict(prompt_inputs or {})
    position = 0
    was_training = model.training
    model.train(False)
    try:
        cache = model.make_cache(batch_size, prompt_length + max_new_tokens)
        for _ in range(max_new_tokens):
            length = new.shape[1]
            position_ids = torch.arange(position, position + length, device=device).expand(batch_size, length)
            hidden = model(new, position_ids, cache=cache, **inputs)
            inputs = {}
            position += length
            logits = model.logits(hidden[:, -1]).float()
            # The maximum is NaN if any logit is. Single logits of -inf, as of a padded vocabulary, are valid.
            if not bool(logits.amax(dim=-1).isfinite().all()):
                raise NonFiniteError(f"token {position}: the model's logits contain inf or NaN")
            if num_tokens is not None:
                logits[:, num_tokens:] = -torch.inf
            if do_sample:
                probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(dim=-1)
                chosen = torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(1)
            else:
                chosen = logits.argmax(dim=-1)
            if eos:
                chosen = torch.where(finished, ends[0], chosen)
                finished |= torch.isin(chosen, ends)
            new = chosen.unsqueeze(1)
            tokens.append(new)
            if on_token is not None and on_token(chosen):
                break
            if eos and bool(finished.all()):
                break
    finally:
        model.train(was_training)
    return torch.cat(tokens, dim=1)


def filter_logits(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Prepare logits for sampling by temperature, top-k and nucleus, in this order.

    Args:
        logits: float `[B, V]`.
        temperature: divisor of the logits, at least `MIN_TEMPERATURE`; below 1 sharpens, above 1 flattens.
        top_k: keep the k most likely tokens and those tied with the last of them; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches p, at least one token (nucleus
            sampling, https://arxiv.org/abs/1904.09751); 1 keeps all.

    Returns:
        float `[B, V]`, -inf for dropped tokens.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        weakest_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < weakest_kept, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        likelier = probabilities.cumsum(dim=-1) - probabilities
        dropped = likelier >= top_p
        dropped[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits


def check_choices(
    max_new_tokens: int, do_sample: bool = False, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> None:
    """Check these arguments of `generate`.

    Raises:
        ConfigError: lists all invalid arguments.
    """
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if not MIN_TEMPERATURE <= temperature < math.inf:
        problems.append(
            f"temperature = {temperature}: must be at least {MIN_TEMPERATURE}; for deterministic output decode greedily"
        )
    if top_k < 0:
        problems.append(f"top_k = {top_k}: must be at least 0 (0 keeps all tokens)")
    if not 0 < top_p <= 1:
        problems.append(f"top_p = {top_p}: must be above 0 and at most 1 (1 keeps all tokens)")
    if not do_sample and (temperature != 1.0 or top_k != 0 or top_p != 1.0):
        problems.append("temperature, top_k and top_p have no effect on greedy decoding; remove them, or sample")
    if problems:
        raise ConfigError(problems)
