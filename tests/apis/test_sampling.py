"""The choice of a token against transformers' processors."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from internlm.apis.sampling import Sampling, adjust, filter_logits


def logits(rows: int = 16) -> torch.Tensor:
    return torch.randn(rows, 50, generator=torch.Generator().manual_seed(5)) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.2, 1.0])
def test_filters_equal_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    expected = TemperatureLogitsWarper(temperature)(None, logits())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p > 0:
        expected = MinPLogitsWarper(min_p)(None, expected)
    assert torch.equal(filter_logits(logits(), temperature, top_k, top_p, min_p), expected)


def test_the_repetition_penalty_equals_transformers() -> None:
    row, prompt, new = logits(1)[0], [3, 4, 3], [7, 4]
    found = adjust(row, Sampling(max_new_tokens=9, repetition_penalty=1.7), prompt, new)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + new]), row[None].clone())
    assert torch.equal(found, expected[0])


def test_penalties_of_new_tokens_and_bias_add_up() -> None:
    row = logits(1)[0]
    sampling = Sampling(
        max_new_tokens=9, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: -1.0, 9: 3.0}, min_new_tokens=5,
        eos_ids=(1, 2), num_tokens=40,
    )  # fmt: skip
    found = adjust(row, sampling, [7, 8], [7, 5, 7])
    expected = row.clone()
    expected[7] += -0.5 - 2 * 0.25 - 1.0
    expected[5] += -0.75
    expected[9] += 3.0
    expected[[1, 2]] = -torch.inf
    expected[40:] = -torch.inf
    torch.testing.assert_close(found, expected)
    assert torch.equal(row, logits(1)[0])  # the argument is not changed
