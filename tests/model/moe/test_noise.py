"""The random numbers of routers: their distribution, and what they depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from internlm.model.moe.noise import (
    RouterNoise,
    Stream,
    jittered,
    noise_key,
    random_bits,
    uniform,
    with_gumbel,
)

KEY = noise_key(1024, 17, 3)
POSITIONS = torch.arange(4000)


def numbers(key: int = KEY, stream: Stream = Stream.GUMBEL, width: int = 64) -> Tensor:
    return uniform(key, stream, POSITIONS, width, torch.float64)


def test_they_are_uniform() -> None:
    sample = numbers().flatten().sort().values
    assert sample[0] > 0 and sample[-1] < 1
    # Kolmogorov and Smirnov: above 1.95 / sqrt(n) once in 1,000 samples.
    expected = (torch.arange(len(sample)) + 0.5) / len(sample)
    assert (sample - expected).abs().max() < 1.95 / math.sqrt(len(sample))


def test_every_bit_of_them_is_fair() -> None:
    bits = random_bits(KEY, Stream.JITTER, POSITIONS, 64)
    ones = torch.stack([(bits >> bit & 1).double().mean() for bit in range(32)])
    assert (ones - 0.5).abs().max() < 4 * 0.5 / math.sqrt(bits.numel())


@pytest.mark.parametrize(
    "other",
    [
        numbers(noise_key(1025, 17, 3)),
        numbers(noise_key(1024, 18, 3)),
        numbers(noise_key(1024, 17, 4)),
        numbers(stream=Stream.JITTER),
        numbers().roll(1, 0),
        numbers().roll(1, 1),
    ],
    ids=["seed", "sample", "layer", "stream", "token", "column"],
)
def test_others_are_independent(other: Tensor) -> None:
    one = numbers()
    correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(one.numel())
    # And not close to each other more often than by chance.
    near = ((one - other).abs() < 0.01).double().mean()
    assert abs(near - 0.0199) < 4 * math.sqrt(0.0199 / one.numel())


def test_a_token_has_the_same_numbers_wherever_it_is() -> None:
    all_tokens = numbers()
    some = torch.tensor([3999, 0, 17])
    assert torch.equal(uniform(KEY, Stream.GUMBEL, some, 64, torch.float64), all_tokens[some])
    assert torch.equal(uniform(torch.tensor(KEY), Stream.GUMBEL, some, 64, torch.float64), all_tokens[some])
    assert torch.equal(uniform(KEY, Stream.GUMBEL, some, 64, torch.float32).double(), all_tokens[some])
    assert torch.equal(uniform(KEY, Stream.GUMBEL, some, 5, torch.float64), all_tokens[some, :5])


def test_jitter_multiplies_by_numbers_around_one() -> None:
    factors = jittered(torch.ones(4000, 16), RouterNoise(jitter=0.01), KEY, POSITIONS)
    assert 0.99 <= factors.min() < 0.9901 and 1.0099 < factors.max() <= 1.01
    assert abs(float(factors.double().mean()) - 1) < 4 * 0.01 / math.sqrt(3 * factors.numel())


def test_the_largest_logit_with_gumbel_noise_is_a_sample_of_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    chosen = with_gumbel(logits.expand(4000, 4), KEY, POSITIONS).argmax(-1)
    expected = logits.softmax(-1) * 4000
    counts = torch.bincount(chosen, minlength=4)
    # Chi-squared with 3 degrees of freedom: above 16.3 once in 1,000 samples.
    assert ((counts - expected) ** 2 / expected).sum() < 16.3
