"""How likely given tokens are: forward passes without a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internlm.apis.engine import GenerativeModel, Logprob, NonFiniteError, logprob_of, rows_are_independent
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.utils.errors import ConfigError

LOGITS_AT_ONCE = 1 << 24
"""Logits in memory: 64 MiB in fp32."""
DEFAULT_TOKENS = 4096
"""Tokens of a pass over several texts."""


@dataclass(frozen=True)
class Ending:
    """A text, of which the tokens from `start` on are an ending that is scored.

    Attributes:
        ids: its tokens.
        start: from 1 to before `len(ids)`.
    """

    ids: Sequence[int]
    start: int


@dataclass(frozen=True)
class EndingScore:
    """How likely an ending is, given the tokens in front of it.

    Attributes:
        value: natural logarithm of its probability, summed over its tokens in float64.
        is_greedy: whether each of its tokens is the most likely one in its place (the first of equal ones).
    """

    value: float
    is_greedy: bool


@torch.inference_mode()
def score_tokens(
    model: GenerativeModel, ids: Sequence[int], num_top: int = 0, num_tokens: int | None = None
) -> list[Logprob]:
    """How likely each token of a text but the first is, given those before it.

    Args:
        model: in evaluation mode.
        ids: N tokens, at least one.
        num_top, num_tokens: see `logprob_of`.

    Returns:
        N - 1 results, of the tokens 1 to N - 1.

    Raises:
        ConfigError: there is no token.
    """
    if not ids:
        raise ConfigError("a text to score must have a token")
    if len(ids) == 1:
        return []
    targets = iter(ids[1:])
    logprobs = _logprobs(model, _hidden(model, [ids[:-1]]))
    return [logprob_of(next(targets), row, num_top, num_tokens) for rows in logprobs for row in rows]


@torch.inference_mode()
def score_endings(
    model: GenerativeModel,
    endings: Sequence[Ending],
    *,
    tokens_at_once: int = DEFAULT_TOKENS,
    num_tokens: int | None = None,
    on_scored: Callable[[int], object] | None = None,
) -> list[EndingScore]:
    """How likely several endings are; the scores are those of `score_tokens`, summed, apart from rounding.

    Texts are packed as documents in training are. Those that differ in their last token only are computed once. In a
    model whose experts have a capacity, texts beside each other would compete for it, so each has a pass of its own.

    Args:
        model: in evaluation mode.
        endings: in any order; the longest are computed first.
        tokens_at_once: of a pass, unless a single text has more.
        num_tokens: ids from this one on (the padding of the vocabulary) are not the most likely ones; None: all may be.
        on_scored: called after each pass with the number of endings that it scored.

    Raises:
        ConfigError: an argument is invalid.
        NonFiniteError: a score is NaN.
    """
    if tokens_at_once < 1:
        raise ConfigError(f"tokens_at_once = {tokens_at_once} must be at least 1")
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, ending in enumerate(endings):
        if not 1 <= ending.start < len(ending.ids):
            raise ConfigError(f"an ending of {len(ending.ids)} tokens cannot start at token {ending.start}")
        numbers.setdefault(tuple(ending.ids[:-1]), []).append(number)
    inputs = sorted(numbers, key=len, reverse=True)
    scores: dict[int, EndingScore] = {}
    for group in _groups(inputs, tokens_at_once if rows_are_independent(model) else 1):
        found = _score_pass(model, group, [[endings[number] for number in numbers[ids]] for ids in group], num_tokens)
        scores |= dict(zip((number for ids in group for number in numbers[ids]), found, strict=True))
        if on_scored is not None:
            on_scored(len(found))
    return [scores[number] for number in range(len(endings))]


def _groups(inputs: Sequence[tuple[int, ...]], tokens_at_once: int) -> Iterator[list[tuple[int, ...]]]:
    group: list[tuple[int, ...]] = []
    size = 0
    for ids in inputs:
        if group and size + len(ids) > tokens_at_once:
            yield group
            group, size = [], 0
        group.append(ids)
        size += len(ids)
    if group:
        yield group


def _score_pass(
    model: GenerativeModel, inputs: Sequence[Sequence[int]], endings: Sequence[Sequence[Ending]], num_tokens: int | None
) -> list[EndingScore]:
    """The scores of the endings of each input, one after the other, by one forward pass."""
    places: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    offset = 0
    for ids, group in zip(inputs, endings, strict=True):
        for ending in group:
            places += range(offset + ending.start - 1, offset + len(ending.ids) - 1)
            targets += ending.ids[ending.start :]
            lengths.append(len(ending.ids) - ending.start)
        offset += len(ids)
    hidden = _hidden(model, inputs)
    wanted = torch.tensor(targets, device=hidden.device)
    values = torch.empty(len(targets), dtype=torch.float64, device=hidden.device)
    is_best = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    start = 0
    for logprobs in _logprobs(model, hidden[torch.tensor(places, device=hidden.device)]):
        rows = slice(start, start + len(logprobs))
        values[rows] = logprobs.gather(1, wanted[rows, None])[:, 0].double()
        is_best[rows] = logprobs[:, :num_tokens].argmax(dim=1) == wanted[rows]
        start = rows.stop
    sums = torch.stack([part.sum() for part in values.split(lengths)]).tolist()
    greedy = torch.stack([part.all() for part in is_best.split(lengths)]).tolist()
    if any(map(math.isnan, sums)):
        raise NonFiniteError("the log-probability of an ending is NaN")
    return [EndingScore(*each) for each in zip(sums, greedy, strict=True)]


def _hidden(model: GenerativeModel, inputs: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states `[P, h]` of the P tokens of several texts, packed into one row."""
    assert isinstance(model, nn.Module)
    device = next(model.parameters()).device
    lengths = tuple(map(len, inputs))
    ids = torch.tensor([[id for each in inputs for id in each]], device=device)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).to(device)[None]
    if len(inputs) == 1:
        return model(ids, position_ids)[0]
    varlen = VarlenMetadata.of(lengths)
    varlen = VarlenMetadata(varlen.cu_seqlens.to(device), lengths, varlen.max_seqlen)
    return model(ids, position_ids, varlen=varlen)[0]


def _logprobs(model: GenerativeModel, hidden: Tensor) -> Iterator[Tensor]:
    """Log-probabilities `[n, V]` of the tokens behind hidden states `[N, h]`, so many rows at a time as fit."""
    start, rows = 0, 1
    while start < len(hidden):
        logits = model.logits(hidden[start : start + rows])
        yield logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        start += len(logits)
        rows = max(1, LOGITS_AT_ONCE // logits.shape[1])
