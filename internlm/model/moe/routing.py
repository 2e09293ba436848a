"""Routing: from the logits of a router to the experts of each token and their weights.

Pure functions of tensors in fp32, or in float64 for float64 logits: in bf16, scores tie and choices flip. T tokens, E
experts, k of them for a token.

With logits l, and p = softmax(l) or sigmoid(l), a token's experts are the k largest of p, or of p + b with a selection
bias b. The weight of a chosen expert is p, divided by the sum over the chosen ones if the form normalizes, times its
scale. Softmax with normalization equals the softmax over the chosen logits alone. Sources:

- softmax: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; Switch, https://arxiv.org/abs/2101.03961;
  normalized: GShard, https://arxiv.org/abs/2006.16668, and Mixtral, https://arxiv.org/abs/2401.04088;
- limit to the groups with the largest maximum: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.2.2;
- sigmoid, and a limit to the groups with the largest sum of their two best: DeepSeek-V3,
  https://arxiv.org/abs/2412.19437, equations 12-16;
- selection bias: https://arxiv.org/abs/2408.15664.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from internlm.model.moe.router_form import RouterForm

_EPSILON = 1e-20
"""Added to sums of sigmoids, which may underflow to 0; the value in DeepSeek's code."""


def probabilities(logits: Tensor, form: RouterForm) -> Tensor:
    """Scores of the experts, each in [0, 1].

    Args:
        logits: `[T, E]`.
        form: of the router.

    Returns:
        fp32 (float64 for float64 logits) `[T, E]`. Rows of softmax add up to 1, those of sigmoid do not
        (`expert_distribution`).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.softmax(-1) if form.scores == "softmax" else logits.sigmoid()


def expert_distribution(scores: Tensor, form: RouterForm) -> Tensor:
    """Scores as a distribution over all experts, the input of the losses in `balance.py`.

    Sigmoids are divided by their sum (DeepSeek-V3, equation 19).

    Args:
        scores: `[T, E]`, from `probabilities`.
        form: of the router.

    Returns:
        `[T, E]`; rows add up to 1.
    """
    return scores if form.scores == "softmax" else scores / (scores.sum(-1, keepdim=True) + _EPSILON)


@torch.no_grad()
def choose_experts(scores: Tensor, form: RouterForm, bias: Tensor | None = None) -> Tensor:
    """The experts of each token, those of the largest scores.

    Among equal scores the lowest index comes first, for experts and for groups, on every device. NaN counts as the
    largest score: it is chosen, and so appears in the weights.

    Args:
        scores: `[T, E]`, from `probabilities`.
        form: of the router.
        bias: `[E]`, the selection bias; given exactly if the form has one.

    Returns:
        int64 `[T, k]`, distinct in a row, by descending score (with bias).

    Raises:
        ValueError: if a bias is missing or unexpected.
    """
    if form.has_bias != (bias is not None):
        raise ValueError(f"has_bias = {form.has_bias} but the bias is {'missing' if bias is None else 'given'}")
    choice = _ordered(scores if bias is None else scores + bias)
    if form.has_group_limit:
        groups = choice.unflatten(-1, (form.num_groups, form.experts_per_group))
        best = groups.amax(-1) if form.group_score == "max" else groups.topk(2, dim=-1).values.sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, _largest(_ordered(best), form.top_groups), True)
        choice = groups.masked_fill(~allowed[..., None], -math.inf).flatten(-2)
    return _largest(choice, form.top_k)


def weights_of(scores: Tensor, experts: Tensor, form: RouterForm) -> Tensor:
    """Factors on the outputs of the chosen experts.

    With k = 1, normalized weights are constant, so that only the losses of `balance.py` train the router.

    Args:
        scores: `[T, E]`, from `probabilities`, with gradient.
        experts: int64 `[T, k]`, from `choose_experts`.
        form: of the router.

    Returns:
        `[T, k]`, in the dtype of `scores`.
    """
    weights = scores.gather(-1, experts)
    if form.normalizes:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total + _EPSILON if form.scores == "sigmoid" else total)
    return weights if form.scale == 1.0 else weights * form.scale


def _ordered(values: Tensor) -> Tensor:
    """NaN becomes infinity, and negative infinity a finite value: it is reserved for what is excluded."""
    return values.nan_to_num(nan=math.inf, posinf=math.inf, neginf=torch.finfo(values.dtype).min)


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices `[T, count]` of the largest values of each row, in descending order, equal ones by ascending index.

    `torch.topk` leaves the order of equal values open. Values must not be NaN, and at least `count` of each row must be
    above negative infinity.
    """
    if not values.is_cpu:
        return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    # argmax returns the first of equal values. On a CPU, `count` rounds of it take a fifth of the time of the sort.
    values = values.clone()
    rounds = []
    for _ in range(count):
        index = values.argmax(-1, keepdim=True)
        rounds.append(index)
        values.scatter_(-1, index, -math.inf)
    return torch.cat(rounds, dim=-1)
