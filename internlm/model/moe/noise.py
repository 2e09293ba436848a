"""Random numbers of routers: functions of seed, sample, layer and position, equal in every layout and recomputation.

A number is a hash, drawn where it is needed, so ranks that share a sample draw the numbers of their own tokens only.

- jitter multiplies the input of a router by U(1 - e, 1 + e): Switch, https://arxiv.org/abs/2101.03961, section 2.4;
- Gumbel noise on logits makes the choice of the k largest a sample of k experts without replacement from their
  softmax: Kool et al. 2019, https://arxiv.org/abs/1903.06059; for the second of two experts: GShard,
  https://arxiv.org/abs/2006.16668, algorithm 1.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from internlm.model.moe.router_form import RouterForm
from internlm.model.moe.routing import choose_experts, probabilities

GumbelChoices = Literal["none", "all", "after_first"]
"""The choices of a token that Gumbel noise on the logits takes part in."""

_WORD = 0xFFFFFFFF
_BITS = 23
"""Random bits of a number: the centres of so many intervals are exact in fp32."""

_BLOCK = 1 << 16
"""Elements that are hashed at once: temporaries of int64 that fit into the cache of a core."""


@dataclass(frozen=True)
class RouterNoise:
    """Noise of a router in training.

    Attributes:
        jitter: e of the factor U(1 - e, 1 + e) on each element of the router's input; 0: none.
        gumbel: which choices are made with noise on the logits.
    """

    jitter: float = 0.0
    gumbel: GumbelChoices = "none"


class Stream(IntEnum):
    """What numbers are for; those of different streams are independent."""

    JITTER = 0
    GUMBEL = 1
    SELECTION = 2


def noise_key(seed: int, sample: int, layer: int) -> int:
    """The key of a router's numbers for a sample, in [0, 2**62).

    Args:
        seed: of the run.
        sample: number of the sample, counted over the whole run.
        layer: of the router.
    """
    digest = hashlib.blake2b(f"{seed}/{sample}/{layer}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def random_bits(key: int | Tensor, stream: Stream, positions: Tensor, width: int) -> Tensor:
    """Independent uniform integers.

    Args:
        key: from `noise_key`; a scalar tensor if it was saved for recomputation.
        stream: purpose of the numbers.
        positions: int64 `[t]`, of the tokens in their sample, below 2**32.
        width: n, numbers of each token.

    Returns:
        int64 `[t, n]`, in [0, 2**32).
    """
    rows = _mixed(((positions ^ (key & _WORD)) + stream * 0x85EBCA6B) & _WORD)
    rows = _mixed(((rows ^ (key >> 32)) + 0x9E3779B9) & _WORD)
    columns = _mixed(torch.arange(1, width + 1, device=positions.device) * 0x9E3779B1 & _WORD)
    out = rows.new_empty(len(rows), width)
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, len(rows), step):
        out[start : start + step] = _mixed(rows[start : start + step, None] ^ columns)
    return out


def uniform(key: int | Tensor, stream: Stream, positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Uniform numbers in (0, 1), exactly equal in fp32 and float64; for the arguments see `random_bits`."""
    bits = random_bits(key, stream, positions, width)
    return bits.bitwise_right_shift_(32 - _BITS).to(dtype).add_(0.5).mul_(2.0**-_BITS)


def jittered(x: Tensor, noise: RouterNoise, key: int | Tensor, positions: Tensor) -> Tensor:
    """x `[t, h]`, in fp32 or float64, times U(1 - e, 1 + e) element by element."""
    numbers = uniform(key, Stream.JITTER, positions, x.shape[1], x.dtype)
    return x * numbers.mul_(2).sub_(1).mul_(noise.jitter).add_(1)


def with_gumbel(logits: Tensor, key: int | Tensor, positions: Tensor) -> Tensor:
    """Logits `[t, E]`, in fp32 or float64, plus standard Gumbel noise."""
    return logits - uniform(key, Stream.GUMBEL, positions, logits.shape[1], logits.dtype).log_().neg_().log_()


def choose_with_noise(
    logits: Tensor,
    scores: Tensor,
    form: RouterForm,
    noise: RouterNoise,
    key: int,
    positions: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The experts of each token, `choose_experts` with noise on the logits.

    Args:
        logits: `[t, E]`.
        scores: `[t, E]`, `probabilities(logits)`.
        form: of the router.
        noise: of the router, with Gumbel noise.
        key: of the sample and layer.
        positions: int64 `[t]`, of the tokens in the sample.
        bias: `[E]`, the selection bias, if the form has one.

    Returns:
        int64 `[t, k]`.
    """
    logits = with_gumbel(logits, key, positions)
    if noise.gumbel == "all":
        return choose_experts(probabilities(logits, form), form, bias)
    first = choose_experts(scores, replace(form, top_k=1), bias)
    others = probabilities(logits.scatter(1, first, -torch.inf), form)
    return choose_experts(others.scatter(1, first, torch.inf), form, bias)


def _mixed(keys: Tensor) -> Tensor:
    """A 32-bit hash of each int64 below 2**32: multiply, shift and xor, twice; no product reaches 2**63."""
    for _ in range(2):
        keys = (((keys >> 16) ^ keys) * 0x45D9F3B) & _WORD
    return (keys >> 16) ^ keys
