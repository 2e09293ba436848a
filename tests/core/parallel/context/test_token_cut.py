"""Cuts of a sample over context ranks, and the choice among them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from internlm.core.parallel.context.cut_choice import attention_cost, choose_cut
from internlm.core.parallel.context.token_cut import CUT_NAMES, CutName, TokenRange, cut_tokens
from internlm.core.parallel.context.token_pieces import TokenPieces


@pytest.mark.parametrize("name", CUT_NAMES)
def test_each_token_has_one_owner_and_each_rank_equally_many(name: CutName) -> None:
    rng = random.Random(0)
    for _ in range(200):
        num_ranks = rng.choice([1, 2, 3, 4, 8])
        left = num_tokens = num_ranks * rng.randint(1, 40)
        lengths = []
        while left:
            lengths.append(rng.choice([0, rng.randint(1, left), rng.randint(1, min(7, left))]))
            left -= lengths[-1]
        cut = cut_tokens(lengths, num_ranks, name)
        owned = [cut.indices(rank) for rank in range(num_ranks)]
        assert sorted(np.concatenate(owned)) == list(range(num_tokens))
        assert {len(each) for each in owned} == {num_tokens // num_ranks} == {cut.tokens_per_rank}
        assert all((np.diff(each) > 0).all() for each in owned)


def test_cuts_of_one_document() -> None:
    assert cut_tokens([16], 2, "contiguous").ranges == ((TokenRange(0, 8),), (TokenRange(8, 16),))
    zigzag = ((TokenRange(0, 4), TokenRange(12, 16)), (TokenRange(4, 12),))
    assert cut_tokens([16], 2, "zigzag").ranges == cut_tokens([16], 2, "document_zigzag").ranges == zigzag


def imbalance(lengths: list[int], num_ranks: int, name: CutName) -> float:
    pairs, _ = TokenPieces.of(lengths, cut_tokens(lengths, num_ranks, name)).work(None)
    return float(pairs.max() / pairs.mean())


def test_balance_of_one_long_document() -> None:
    """Contiguous: the last of c ranks has 2 - 1 / c of the mean; zigzag is even."""
    assert imbalance([4096], 4, "contiguous") == pytest.approx(2 - 1 / 4, rel=1e-3)
    assert imbalance([4096], 4, "zigzag") == imbalance([4096], 4, "document_zigzag") == 1.0


def test_balance_of_random_documents() -> None:
    """Mean over samples of documents with a heavy tail, as in pretraining data: zigzags are better than contiguous."""
    rng = random.Random(0)
    means = dict.fromkeys(CUT_NAMES, 0.0)
    for _ in range(50):
        lengths, left = [], 8192
        while left:
            lengths.append(min(left, int(rng.paretovariate(0.8) * 64)))
            left -= lengths[-1]
        for name in CUT_NAMES:
            means[name] += imbalance(lengths, 4, name) / 50
    assert means["document_zigzag"] < 1.1 < means["zigzag"] < means["contiguous"]


def test_the_choice_has_the_least_work_of_the_slowest_rank() -> None:
    rng = random.Random(1)
    for _ in range(50):
        lengths = [rng.randint(1, 3000) for _ in range(rng.randint(1, 6))]
        lengths[-1] += -sum(lengths) % 4
        layers = {None: 2, 64: 1}
        chosen = choose_cut(lengths, 4, layers)
        costs = {
            name: attention_cost(TokenPieces.of(lengths, cut_tokens(lengths, 4, name)), layers) for name in CUT_NAMES
        }
        assert costs[chosen.name] == min(costs.values())


@pytest.mark.parametrize(
    "lengths,layers,expected",
    [
        pytest.param([65536], {None: 1}, "zigzag", id="one long document"),
        pytest.param([512] * 128, {None: 1}, "contiguous", id="short documents"),
        pytest.param([65536], {256: 1}, "contiguous", id="a sliding window"),
        pytest.param([32768, 16384, 16384], {None: 1}, "document_zigzag", id="long documents"),
    ],
)
def test_which_cut_suits_what(lengths: list[int], layers: dict[int | None, int], expected: CutName) -> None:
    assert choose_cut(lengths, 4, layers).name == expected
