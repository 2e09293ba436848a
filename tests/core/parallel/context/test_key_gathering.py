"""Keys that are gathered in one step: who needs which, and the rows and gradients as they travel."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from helpers.tiny import micro_batch, tiny_model
from torch import Tensor

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.context.context_attention import context_groups
from internlm.core.parallel.context.gathered_rows import gather_rows
from internlm.core.parallel.context.key_gathering import KeyGathering, make_key_gathering
from internlm.core.parallel.context.token_cut import CUT_NAMES, TokenCut, cut_tokens
from internlm.core.parallel.context.token_pieces import TokenPieces
from internlm.core.parallel.model_parallel import parallel_of
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.verify.choices import LATENT_KEYS


def random_lengths(rng: random.Random, num_ranks: int) -> tuple[int, ...]:
    lengths = [rng.choice([0, 1, 2, 5, 13, 40]) for _ in range(rng.randint(1, 7))]
    return (*lengths, num_ranks + -sum(lengths) % num_ranks)


def gathered_tokens(gatherings: list[KeyGathering], cut: TokenCut, rank: int) -> list[int]:
    """The tokens whose keys a rank has, in order, from what each rank sends."""
    own = gatherings[rank]
    sent = {}
    for source, other in enumerate(gatherings):
        rows = other.sends.get(rank, ()) if source != rank else ((0, own.num_tokens),)
        sent[source] = [int(cut.indices(source)[row]) for start, stop in rows for row in range(start, stop)]
    tokens = []
    for source, number in own.segments:
        tokens += sent[source][:number]
        del sent[source][:number]
    assert not any(sent.values()), "a rank sends more than is gathered"
    return tokens


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_each_query_sees_exactly_its_keys(num_ranks: int) -> None:
    rng = random.Random(num_ranks)
    for _ in range(60):
        lengths, name = random_lengths(rng, num_ranks), rng.choice(CUT_NAMES)
        window = rng.choice([None, None, 1, 3, 11, 1000])
        cut = cut_tokens(lengths, num_ranks, name)
        pieces = TokenPieces.of(lengths, cut)
        gatherings = [make_key_gathering(pieces, rank, window) for rank in range(num_ranks)]
        document = np.repeat(np.arange(len(lengths)), lengths)
        for rank, gathering in enumerate(gatherings):
            tokens = np.array(gathered_tokens(gatherings, cut, rank))
            assert (np.diff(tokens) > 0).all() and len(tokens) == gathering.num_rows <= gathering.num_keys
            assert gathering.num_keys % 16 == 0
            own = cut.indices(rank)
            distance = own[:, None] - tokens
            expected = (document[own][:, None] == document[tokens]) & (distance >= 0)
            expected &= distance < (len(document) if window is None else window)
            seen = np.zeros_like(expected, dtype=np.int64)
            for tile in gathering.tiles:
                q, k = np.arange(tile.q_start, tile.q_stop), np.arange(tile.k_start, tile.k_stop)
                assert tile.distance is not None
                apart = tile.distance + (q - tile.q_start)[:, None] - (k - tile.k_start)
                seen[np.ix_(q, k)] += (apart >= 0) & (apart < (len(document) if window is None else window))
            assert (seen == expected).all()
            # Nothing is gathered that no own query sees.
            assert (expected.any(0) | np.isin(tokens, own)).all()


def errors_and_bytes(num_ranks: int, cut_name: str, window: int | None) -> tuple[float, float, int, int]:
    """Largest errors of rows and gradients, and bytes sent in forward and backward, of bf16 rows of 5 numbers."""
    context = ParallelContext.create(ParallelLayout(world_size=num_ranks, context=num_ranks))
    groups, rank = context_groups(context), context.index("context")
    lengths = (13, 1, 30, 4)
    cut = cut_tokens(lengths, num_ranks, cut_name)  # type: ignore[arg-type]
    pieces = TokenPieces.of(lengths, cut)
    gatherings = [make_key_gathering(pieces, other, window) for other in range(num_ranks)]
    tokens = torch.tensor(gathered_tokens(gatherings, cut, rank))
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(sum(lengths), 5, generator=generator, dtype=torch.float64)
    x = whole[cut.indices(rank)].to(torch.bfloat16).unsqueeze(0).requires_grad_()
    sent = {groups.keys: 0, groups.gradients: 0}
    start = dist.batch_isend_irecv

    def batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        for each in operations:
            if each.op is dist.isend:
                sent[each.group] += each.tensor.nbytes
        return start(operations)

    with patch.object(dist, "batch_isend_irecv", batch):
        rows = gather_rows(x, gatherings[rank], groups)
        # One ulp of a large and a small number: summed in bf16, the small ones of other ranks would be lost.
        weights = torch.full((rows.shape[1], 5), 1.0 if rank else 256.0, dtype=torch.bfloat16)
        (grad,) = torch.autograd.grad(rows, x, weights.unsqueeze(0))
    expected = torch.zeros(sum(lengths), 5, dtype=torch.float64)
    for other in range(num_ranks):
        expected[gathered_tokens(gatherings, cut, other)] += 1.0 if other else 256.0
    expected = expected[cut.indices(rank)].to(torch.bfloat16)
    found = rows[0, : len(tokens)].double()
    error = float((found - whole[tokens].to(torch.bfloat16).double()).abs().max() + rows[0, len(tokens) :].abs().sum())
    context.close()
    return error, float((grad[0] - expected).abs().max()), sent[groups.keys], sent[groups.gradients]


@pytest.mark.parametrize(("num_ranks", "window"), [(2, None), (4, None), (4, 5), (3, None)])
@pytest.mark.parametrize("cut_name", CUT_NAMES)
def test_rows_and_their_gradients_travel(
    num_ranks: int, window: int | None, cut_name: str, ranks: Callable[[int], RankPool]
) -> None:
    pieces = TokenPieces.of((13, 1, 30, 4), cut_tokens((13, 1, 30, 4), num_ranks, cut_name))  # type: ignore[arg-type]
    gatherings = [make_key_gathering(pieces, rank, window) for rank in range(num_ranks)]
    for rank, (of_rows, of_gradients, sent, returned) in enumerate(
        ranks(num_ranks).run(errors_and_bytes, num_ranks, cut_name, window)
    ):
        assert of_rows == of_gradients == 0.0
        needed = sum(stop - start for rows in gatherings[rank].sends.values() for start, stop in rows)
        held = gatherings[rank].num_rows - gatherings[rank].num_tokens
        assert (sent, returned) == (2 * 5 * needed, 2 * 5 * held)


LATENT = {path.removeprefix("model."): value for path, value in LATENT_KEYS.items()}


def trained(changes: dict[str, Any]) -> tuple[dict[str, Tensor], int, int, int, int]:
    """This rank's gradients of a pass, the numbers that it sent in forward and backward, and rows of a gathering."""
    context = ParallelContext.create(ParallelLayout(world_size=2, context=2))
    model = tiny_model(context, model_type="DEEPSEEK_V2", num_kv_attention_heads=None, **LATENT, **changes)
    parallel = parallel_of(model)
    sample = parallel.split_sample(micro_batch(0, (7, 1, 12, 4)))
    micro = sample.micro_batch
    sent = 0
    start = dist.batch_isend_irecv

    def batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        nonlocal sent
        sent += sum(each.tensor.numel() for each in operations if each.op is dist.isend)
        return start(operations)

    with patch.object(dist, "batch_isend_irecv", batch):
        hidden = model(micro.input_ids, micro.position_ids, sample.documents(micro))
        forward = sent
        loss = parallel.head_loss(model, hidden, micro.labels, micro.type_ids, linear_cross_entropy).loss.loss_sum
        loss.backward()
    parallel.end_backward()
    assert sample.plans is not None
    gathering = sample.plans.gatherings[None]
    rows = sum(stop - first for rows in gathering.sends.values() for first, stop in rows)
    returned = gathering.num_rows - gathering.num_tokens
    context.close()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, forward, sent - forward, rows, returned


@pytest.mark.parametrize("policy", ["nothing", "attention", "matmuls"])
def test_latent_vectors_travel_once_and_again_in_recomputation(policy: str, ranks: Callable[[int], RankPool]) -> None:
    """In each of two layers: 12 + 4 numbers of a token, not those of all heads."""
    recomputed = {"checkpoint": 1.0, "checkpoint_save_policy": policy}
    for (expected, *plain), (found, *again) in zip(
        ranks(2).run(trained, {}), ranks(2).run(trained, recomputed), strict=True
    ):
        _, _, rows, returned = plain
        assert rows + returned > 0
        assert plain == [2 * 16 * rows, 2 * 16 * returned, rows, returned]
        assert again == [2 * 16 * rows, 2 * 16 * (rows + returned), rows, returned]
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
