from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from internlm.model.moe.balance import (
    BiasRule,
    counts_by_sequence,
    load_balancing_loss,
    sequence_balancing_loss,
    sequences_of,
    updated_bias,
    z_loss,
)
from internlm.model.moe.router_form import RouterForm
from internlm.model.moe.routing import choose_experts, expert_distribution, probabilities

DTYPES = (torch.float32, torch.float64)
E, K = 8, 2
FORMS = [RouterForm(E, K), RouterForm(E, K, scores="sigmoid")]
some = settings(max_examples=50, deadline=None)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def counts_of(experts: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(experts, E).sum((0, 1))


def routed(logits: Tensor, form: RouterForm) -> tuple[Tensor, Tensor]:
    """Distributions `[T, E]` and experts `[T, k]`."""
    scores = probabilities(logits, form)
    return expert_distribution(scores, form), choose_experts(scores, form)


def close(mine: Tensor, truth: Tensor, **tolerance: float) -> None:
    exact = mine.dtype == torch.float64
    tolerance = tolerance or {"rtol": 1e-12 if exact else 1e-5, "atol": 1e-14 if exact else 1e-7}
    torch.testing.assert_close(mine, truth, **tolerance)


# -- formulas as loops ----------------------------------------------------------------------------------------------


def balance_in_a_loop(rows: list[list[float]], experts: list[list[int]]) -> float:
    """E sum_e (count_e / (k T)) (mean of p_e), each factor as the papers write it."""
    total = 0.0
    for expert in range(E):
        frequency = sum(chosen.count(expert) for chosen in experts) / (len(experts[0]) * len(rows))
        total += frequency * statistics.fmean(row[expert] for row in rows)
    return E * total


@pytest.mark.parametrize("form", FORMS, ids=["softmax", "sigmoid"])
def test_load_balancing_loss_equals_the_formula(form: RouterForm) -> None:
    rows, experts = routed(random(50, E), form)
    truth = balance_in_a_loop(rows.tolist(), experts.tolist())
    for num_tokens in (50, torch.tensor(50)):
        mine = load_balancing_loss(rows, counts_of(experts), num_tokens, K)
        assert mine.item() == pytest.approx(truth, rel=1e-13) and mine.dtype == torch.float64


def test_z_loss_equals_the_formula() -> None:
    logits = random(50, E)
    truth = statistics.fmean(math.log(math.fsum(map(math.exp, row))) ** 2 for row in logits.tolist())
    assert z_loss(logits, 50).item() == pytest.approx(truth, rel=1e-13)
    large = z_loss(torch.full((3, E), 1e4, dtype=torch.float32), torch.tensor(3))
    assert large.item() == pytest.approx((1e4 + math.log(E)) ** 2)
    assert z_loss(logits.bfloat16(), 50).dtype == torch.float32


@some
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any), st.sampled_from(FORMS), st.integers(0, 10**6))
def test_sequence_loss_is_that_of_each_document(lengths: list[int], form: RouterForm, seed: int) -> None:
    """Documents of a packed row, some of them empty, weighted by their tokens."""
    total = sum(lengths)
    rows, experts = routed(random(total, E, seed=seed), form)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    sequences = sequences_of(cu_seqlens, torch.arange(total))
    assert sequences.tolist() == [document for document, length in enumerate(lengths) for _ in range(length)]
    counts = counts_by_sequence(experts, sequences, len(lengths), E)
    truth = 0.0
    for document, (part, chosen) in enumerate(zip(rows.split(lengths), experts.split(lengths), strict=True)):
        assert torch.equal(counts[document], counts_of(chosen))
        if len(part):
            truth += len(part) / total * balance_in_a_loop(part.tolist(), chosen.tolist())
    assert sequence_balancing_loss(rows, counts, sequences, total).item() == pytest.approx(truth, rel=1e-12)


def test_sequence_loss_of_equal_lengths_is_the_mean() -> None:
    rows, experts = routed(random(40, E), FORMS[1])
    sequences = torch.arange(40) // 10
    counts = counts_by_sequence(experts, sequences, 4, E)
    each = [load_balancing_loss(rows[i : i + 10], counts[i // 10], 10, K) for i in range(0, 40, 10)]
    close(sequence_balancing_loss(rows, counts, sequences, 40), torch.stack(each).mean())


def test_even_load_gives_1_and_collapse_gives_the_most() -> None:
    even = torch.full((8, E), 1 / E)
    assert load_balancing_loss(even, torch.full((E,), 2), 8, K).item() == pytest.approx(1)
    assert load_balancing_loss(even, torch.tensor([16, *[0] * 7]), 8, K).item() == pytest.approx(1)
    collapsed = torch.zeros(8, E)
    collapsed[:, 0] = 1
    assert load_balancing_loss(collapsed, torch.tensor([8, 8, *[0] * 6]), 8, K).item() == pytest.approx(E / K)


# -- one sample on several ranks ------------------------------------------------------------------------------------


def losses(logits: Tensor, form: RouterForm, sample: dict[str, Any], valid: Tensor | None = None) -> list[Tensor]:
    """The three losses of some tokens of a sample, with their positions and the counts of all of its tokens."""
    rows = expert_distribution(probabilities(logits, form), form)
    sequences = sequences_of(sample["cu_seqlens"], sample["positions"])
    return [
        load_balancing_loss(rows, sample["counts"], sample["num_tokens"], K, valid=valid),
        z_loss(logits, sample["num_tokens"], valid=valid),
        sequence_balancing_loss(rows, sample["by_sequence"], sequences, sample["num_tokens"], valid=valid),
    ]


def sample_of(logits: Tensor, form: RouterForm, lengths: list[int], valid: Tensor | None = None) -> dict[str, Any]:
    total = sum(lengths)
    valid = torch.ones(total, dtype=torch.bool) if valid is None else valid
    experts = routed(logits.detach(), form)[1]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    sequences = sequences_of(cu_seqlens, torch.arange(total))
    return {
        "cu_seqlens": cu_seqlens,
        "positions": torch.arange(total),
        "num_tokens": valid.sum(),
        "counts": counts_of(experts[valid]),
        "by_sequence": counts_by_sequence(experts, sequences, len(lengths), E, valid=valid),
        "experts": experts,
    }


@some
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    st.integers(1, 4),
    st.sampled_from(FORMS),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_sum_over_ranks_is_the_value_of_one_process(
    lengths: list[int], num_ranks: int, form: RouterForm, dtype: torch.dtype, has_padding: bool, draw: Any
) -> None:
    """Tokens dealt to ranks at random, so that some have none; losses, gradients and counts add up exactly.

    A rank knows its tokens, their positions, and the counts and the number of tokens of the sample.
    """
    total = sum(lengths)
    logits = random(total, E, seed=draw.randrange(1000), dtype=dtype).requires_grad_()
    valid = torch.tensor([not has_padding or draw.random() < 0.7 for _ in range(total)])
    sample = sample_of(logits, form, lengths, valid)
    whole = losses(logits, form, sample, valid if has_padding else None)
    owners = torch.tensor([draw.randrange(num_ranks) for _ in range(total)])

    parts, by_sequence, counts = [], 0, 0
    for rank in range(num_ranks):
        own = (owners == rank).nonzero().flatten()
        mine = {**sample, "positions": own}
        experts = routed(logits.detach()[own], form)[1]
        assert torch.equal(experts, sample["experts"][own])
        counts = counts + counts_of(experts[valid[own]])
        sequences = sequences_of(sample["cu_seqlens"], own)
        by_sequence = by_sequence + counts_by_sequence(experts, sequences, len(lengths), E, valid=valid[own])
        parts.append(losses(logits[own], form, mine, valid[own] if has_padding else None))
    assert torch.equal(counts, sample["counts"]) and torch.equal(by_sequence, sample["by_sequence"])

    for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        close(torch.stack(pieces).sum(), one)
        (truth,) = torch.autograd.grad(one, logits, retain_graph=True)
        (mine,) = torch.autograd.grad(torch.stack(pieces).sum(), logits, retain_graph=True)
        close(mine, truth)


@pytest.mark.parametrize("form", FORMS, ids=["softmax", "sigmoid"])
def test_padding_changes_nothing(form: RouterForm) -> None:
    """Losses without padding are those of the tokens alone, even where padding is NaN."""
    logits = random(12, E)
    padded = torch.cat([logits, torch.full((5, E), math.nan, dtype=torch.float64)])
    valid = torch.arange(17) < 12
    truth = losses(logits, form, sample_of(logits, form, [5, 7]))
    mine = losses(padded, form, sample_of(padded, form, [5, 12], valid), valid)
    close(torch.stack(mine), torch.stack(truth))


def test_a_sample_without_a_valid_token_has_no_loss() -> None:
    logits = random(3, E).requires_grad_()
    valid = torch.zeros(3, dtype=torch.bool)
    total = torch.stack(losses(logits, FORMS[0], sample_of(logits, FORMS[0], [3], valid), valid)).sum()
    total.backward()
    assert total.item() == 0 and logits.grad is not None and not logits.grad.any()
    assert z_loss(logits[:0], 0).item() == 0


@pytest.mark.parametrize("form", FORMS, ids=["softmax", "sigmoid"])
def test_gradients(form: RouterForm) -> None:
    logits = random(6, E).requires_grad_()
    sample = sample_of(logits, form, [2, 4])
    assert torch.autograd.gradcheck(lambda each: tuple(losses(each, form, sample)), logits)


def test_balance_of_a_global_batch() -> None:
    """With counts and tokens of all micro-batches, the sum over micro-batches is the loss of all tokens together."""
    rows, experts = routed(random(30, E), FORMS[0])
    counts = counts_of(experts)
    parts = [load_balancing_loss(part, counts, 30, K) for part in rows.split([7, 13, 10])]
    assert sum(parts).item() == pytest.approx(balance_in_a_loop(rows.tolist(), experts.tolist()), rel=1e-12)


# -- other implementations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_padded", [False, True])
def test_transformers_loss_of_one_layer_is_k_times_ours(is_padded: bool) -> None:
    """It counts choices per token, not per choice; and it adds up layers before it multiplies, hence one layer."""
    mine, other = (random(24, E, dtype=torch.float32).requires_grad_() for _ in range(2))
    valid = torch.tensor([[True] * 12, [True] * 9 + [False] * 3]) if is_padded else torch.ones(2, 12, dtype=torch.bool)
    flat = valid.flatten()
    rows, experts = routed(mine, FORMS[0])
    ours = load_balancing_loss(rows, counts_of(experts[flat]), flat.sum(), K, valid=flat)
    theirs = load_balancing_loss_func((other,), E, K, valid.float() if is_padded else None) / K
    close(ours, theirs, rtol=1e-6, atol=0)
    close(*(torch.autograd.grad(loss, leaf)[0] for loss, leaf in ((ours, mine), (theirs, other))), rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def megatron() -> Any:
    return pytest.importorskip("megatron.core.transformer.moe.moe_utils", exc_type=ImportError)


@pytest.mark.parametrize("form", FORMS, ids=["softmax", "sigmoid"])
def test_losses_of_megatron(megatron: Any, form: RouterForm) -> None:
    logits = random(40, E).requires_grad_()
    rows, experts = routed(logits, form)
    routing_map, scores = megatron.compute_routing_scores_for_aux_loss(logits, K, form.scores)
    close(rows, scores.double(), rtol=1e-6, atol=1e-8)
    assert torch.equal(routing_map.nonzero()[:, 1].view(-1, K), experts.sort(-1).values)
    pairs: list[tuple[Tensor, Tensor]] = []
    counts = counts_of(experts)
    theirs = megatron.switch_load_balancing_loss_func(rows, counts, 40, K, E, 1.0)
    pairs.append((load_balancing_loss(rows, counts, 40, K), theirs))
    pairs.append((z_loss(logits, 40), megatron.z_loss_func(logits, 1.0)))
    # Its loss by sequence: that of the batch, with sequences as experts of their own, over the number of sequences.
    sequences = torch.arange(40) // 8
    by_sequence = counts_by_sequence(experts, sequences, 5, E)
    wide = rows.view(5, 8, E).transpose(0, 1).reshape(8, 5 * E)
    theirs = megatron.switch_load_balancing_loss_func(wide, by_sequence.flatten(), 8, K, E, 1.0) / 5
    pairs.append((sequence_balancing_loss(rows, by_sequence, sequences, 40), theirs))
    for mine, other in pairs:
        close(mine, other)
        close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (mine, other)))


def test_bias_of_megatron(megatron: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **kwargs: None)
    monkeypatch.setattr(megatron.parallel_state, "get_tensor_and_data_parallel_group", lambda **kwargs: None)
    counts = torch.randint(0, 9, (3, E), generator=torch.Generator().manual_seed(0))
    bias = random(3, E, dtype=torch.float32)
    theirs = megatron.get_updated_expert_bias(counts, bias, 1e-3)
    assert torch.equal(updated_bias(bias, counts, BiasRule(1e-3)), theirs) and not torch.equal(theirs, bias)


# -- the bias rule --------------------------------------------------------------------------------------------------


@some
@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=12), st.booleans())
@example([2**30, 2**30 + 1], False)
def test_bias_rule_equals_the_formula(counts: list[int], centers: bool) -> None:
    """In exact arithmetic: counts are compared with their mean where fp32 has lost their last bits."""
    signs = [(sum(counts) > len(counts) * count) - (sum(counts) < len(counts) * count) for count in counts]
    mean = statistics.fmean(signs) if centers else 0.0
    truth = [0.5 + 0.125 * (sign - mean) for sign in signs]
    bias = torch.full((len(counts),), 0.5)
    new = updated_bias(bias, torch.tensor(counts), BiasRule(0.125, centers))
    assert new.tolist() == pytest.approx(truth, abs=1e-6) and new.dtype == torch.float32
    assert bias.tolist() == [0.5] * len(counts)


def test_centred_bias_keeps_its_mean_and_layers_stay_apart() -> None:
    counts = torch.tensor([[9, 1, 1, 1], [3, 3, 3, 3]])
    bias = updated_bias(torch.zeros(2, 4), counts, BiasRule(1e-3, centers=True))
    torch.testing.assert_close(bias, torch.tensor([[-1.5e-3, 5e-4, 5e-4, 5e-4], [0.0] * 4]))


@pytest.mark.parametrize("centers", [False, True])
def test_bias_balances_a_skewed_router(centers: bool) -> None:
    form = RouterForm(E, K, scores="sigmoid", has_bias=True)
    scores = probabilities(random(500, E, dtype=torch.float32) + torch.linspace(-1, 1, E), form)
    bias = torch.zeros(E)
    violations = []
    for _ in range(200):
        counts = counts_of(choose_experts(scores, form, bias))
        violations.append(counts.max().item() / (500 * K / E) - 1)
        bias = updated_bias(bias, counts, BiasRule(1e-2, centers))
    assert violations[0] > 1 and max(violations[-10:]) < 0.1


def test_losses_wait_for_no_device() -> None:
    """Fake tensors have no values: one that is read on the host raises."""
    with FakeTensorMode():
        logits = torch.randn(6, E, requires_grad=True)
        scores = probabilities(logits, FORMS[0])
        experts = choose_experts(scores, FORMS[0])
        sequences = sequences_of(torch.zeros(3, dtype=torch.int32), torch.arange(6))
        counts = counts_by_sequence(experts, sequences, 2, E, valid=torch.ones(6, dtype=torch.bool))
        num_tokens = torch.ones((), dtype=torch.int64)
        valid = torch.ones(6, dtype=torch.bool)
        total = load_balancing_loss(scores, counts.sum(0), num_tokens, K, valid=valid)
        total = total + z_loss(logits, num_tokens, valid=valid)
        total = total + sequence_balancing_loss(scores, counts, sequences, num_tokens, valid=valid)
        total.backward()
        assert updated_bias(torch.zeros(E), counts.sum(0), BiasRule(1e-3)).shape == (E,)
