"""How the next token of a text is chosen from the logits.

The order of the steps, and each step, is that of transformers' `generate`: repetition penalty, minimum length,
temperature, top-k, top-p, min-p. Presence and frequency penalties, and the bias, which transformers lacks, are as
OpenAI's API defines them, and come after the repetition penalty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from internlm.utils.errors import ConfigError

MIN_TEMPERATURE = 1e-6
"""Dividing logits by a smaller temperature would overflow fp32."""
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for the continuation of one text.

    Attributes:
        max_new_tokens: maximum number of tokens to append, at least 1.
        min_new_tokens: ends are not chosen before this number of tokens.
        do_sample: sample the next token; otherwise take the most likely one, and temperature, top_k, top_p and min_p
            must keep their defaults.
        temperature: divisor of the logits, at least `MIN_TEMPERATURE`; below 1 sharpens, above 1 flattens.
        top_k: keep the k most likely tokens and those tied with the last of them; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches p, at least one token (nucleus
            sampling, https://arxiv.org/abs/1904.09751); 1 keeps all.
        min_p: drop tokens less likely than this share of the most likely one (https://arxiv.org/abs/2407.01082).
        repetition_penalty: logits of tokens that the prompt or the text has are divided by it if positive, else
            multiplied (CTRL, https://arxiv.org/abs/1909.05858); 1: none.
        presence_penalty: subtracted from the logits of tokens that the new text has.
        frequency_penalty: subtracted from the logits of a token once for each time that the new text has it.
        logit_bias: token -> what is added to its logit.
        eos_ids: tokens that end the text.
        num_tokens: ids from this one on (the padding of the vocabulary) are never chosen; None allows all ids.
        top_logprobs: number of most likely tokens, at most all of them, whose log-probabilities are returned with that
            of each new token; None: no log-probabilities at all.
        seed: of the text's own random numbers, so that it does not depend on others beside it.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    num_tokens: int | None = None
    top_logprobs: int | None = None
    seed: int = 0

    def problems(self) -> list[str]:
        """What is wrong with the values, a sentence each."""
        rules = {
            f"max_new_tokens = {self.max_new_tokens}: must be at least 1": self.max_new_tokens >= 1,
            f"min_new_tokens = {self.min_new_tokens}: must be from 0 to max_new_tokens = {self.max_new_tokens}": (
                0 <= self.min_new_tokens <= max(self.max_new_tokens, 0)
            ),
            f"temperature = {self.temperature}: must be at least {MIN_TEMPERATURE}; for deterministic output decode "
            "greedily": MIN_TEMPERATURE <= self.temperature < math.inf,
            f"top_k = {self.top_k}: must be at least 0 (0 keeps all tokens)": self.top_k >= 0,
            f"top_p = {self.top_p}: must be above 0 and at most 1 (1 keeps all tokens)": 0 < self.top_p <= 1,
            f"min_p = {self.min_p}: must be at least 0 (0 keeps all tokens) and at most 1": 0 <= self.min_p <= 1,
            f"repetition_penalty = {self.repetition_penalty}: must be above 0 (1: none)": (
                0 < self.repetition_penalty < math.inf
            ),
            f"presence_penalty = {self.presence_penalty}: must be a finite number": math.isfinite(
                self.presence_penalty
            ),
            f"frequency_penalty = {self.frequency_penalty}: must be a finite number": math.isfinite(
                self.frequency_penalty
            ),
            f"logit_bias = {dict(self.logit_bias)}: must be finite numbers": all(
                math.isfinite(bias) for bias in self.logit_bias.values()
            ),
            f"top_logprobs = {self.top_logprobs}: must be at least 0": self.top_logprobs is None
            or self.top_logprobs >= 0,
            f"top_logprobs = {self.top_logprobs}: must be at most the {self.num_tokens} tokens of the vocabulary": (
                self.num_tokens is None or (self.top_logprobs or 0) <= self.num_tokens
            ),
            f"seed = {self.seed}: must be from {MIN_SEED} to {MAX_SEED}": MIN_SEED <= self.seed <= MAX_SEED,
            "temperature, top_k, top_p and min_p have no effect on greedy decoding; remove them, or sample": (
                self.do_sample or (self.temperature, self.top_k, self.top_p, self.min_p) == (1.0, 0, 1.0, 0.0)
            ),
        }
        return [text for text, holds in rules.items() if not holds]

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: lists all that is wrong.
        """
        problems = self.problems()
        if problems:
            raise ConfigError(problems)


def adjust(logits: Tensor, sampling: Sampling, prompt: Sequence[int], new: Sequence[int]) -> Tensor:
    """Apply penalties, bias, minimum length and the end of the vocabulary to the logits of one text.

    Args:
        logits: float `[V]`; not changed.
        sampling: settings of the text.
        prompt: its first tokens.
        new: the tokens appended so far.

    Returns:
        float `[V]`, -inf for tokens that must not be chosen.
    """
    logits = logits.clone()
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *new}), device=logits.device)
        scores = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if new and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(new)
        penalties = [sampling.presence_penalty + sampling.frequency_penalty * count for count in counts.values()]
        logits[list(counts)] -= torch.tensor(penalties, dtype=logits.dtype, device=logits.device)
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    if len(new) < sampling.min_new_tokens:
        logits[list(sampling.eos_ids)] = -torch.inf
    if sampling.num_tokens is not None:
        logits[sampling.num_tokens :] = -torch.inf
    return logits


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Prepare logits for sampling by temperature, top-k, nucleus and min-p, in this order; see `Sampling`.

    Args:
        logits: float `[..., V]`.

    Returns:
        float `[..., V]`, -inf for dropped tokens.
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
    if min_p > 0.0:
        probabilities = logits.softmax(dim=-1)
        logits = logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)
    return logits


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of one text, from its adjusted logits `[V]`."""
    if not sampling.do_sample:
        return int(logits.argmax())
    kept = filter_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return int(torch.multinomial(kept.softmax(dim=-1), num_samples=1, generator=generator))
