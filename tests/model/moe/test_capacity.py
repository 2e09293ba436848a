"""Layers whose experts have a capacity, against loops over the tokens of a sample in plain Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.configs import small_config
from torch import Tensor

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.model.moe.capacity import Capacity, SamplePart, kept_choices
from internlm.model.moe.feed_forward import MoeFeedForward
from internlm.model.moe.noise import Stream, noise_key, random_bits, uniform
from internlm.model.moe.router import RouterLosses
from internlm.model.moe.sample_tokens import SampleTokens
from internlm.model.registry import build_model

E, H, F, B, S = 4, 16, 8, 2, 9
T = B * S
SEED, SAMPLE = 7, 3


def layer_of(moe_type: str, top_k: int, dtype: str = "torch.float64", **keys: Any) -> MoeFeedForward:
    """The expert layer of a small model in a training step, with weights large enough that experts matter."""
    config = {
        "model.dtype": dtype,
        "model.hidden_size": H,
        "model.num_attention_heads": 2,
        "model.intermediate_size": F,
        "model.num_experts": E,
        "model.top_k": top_k,
        "model.moe_type": moe_type,
        "model.moe_layer_kwargs": keys,
    }
    with torch.device("meta"):
        model = build_model("MIXTRALMOE", small_config(config).model)
    parallelize(model, ParallelContext.create())
    layer = model.layers["1"].feed_forward  # type: ignore[union-attr, index]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(0, 0.5, generator=generator)
    assert isinstance(layer, MoeFeedForward)
    begin(layer)
    return layer


def begin(layer: MoeFeedForward, losses: RouterLosses = RouterLosses()) -> None:  # noqa: B008
    layer.router.begin_step(losses, torch.tensor(1.0), SEED)
    layer.router.sample = SampleTokens(number=SAMPLE)


def tokens() -> Tensor:
    return torch.randn(B, S, H, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()


KEY = noise_key(SEED, SAMPLE, 1)
POSITIONS = torch.arange(T)


def by_weight(p: Tensor, experts: list[list[int]]) -> list[tuple[Any, ...]]:
    """Dropless, `probs`: the order in which an expert takes its choices."""
    total = [sum(p[t, e] for e in experts[t]) for t in range(T)]
    return [(-float(p[t, e] / total[t]), t, i) for t in range(T) for i, e in enumerate(experts[t])]


def by_position(p: Tensor, experts: list[list[int]]) -> list[tuple[Any, ...]]:
    return [(t, t, i) for t in range(T) for i in range(len(experts[t]))]


def by_choice(p: Tensor, experts: list[list[int]]) -> list[tuple[Any, ...]]:
    """GShard: all first choices, then all second ones."""
    return [(i, t, i) for t in range(T) for i in range(len(experts[t]))]


def by_chance(p: Tensor, experts: list[list[int]]) -> list[tuple[Any, ...]]:
    numbers = random_bits(KEY, Stream.SELECTION, POSITIONS, 1)
    return [(int(numbers[t]), t, 0) for t in range(T)]


def largest(row: Tensor, k: int) -> list[int]:
    return sorted(range(E), key=lambda e: (-float(row[e]), e))[:k]


def with_second_by_noise(logits: Tensor) -> list[list[int]]:
    """GShard, k = 2: the first choice is the largest logit, the second the largest with noise among the others."""
    noise = -(-uniform(KEY, Stream.GUMBEL, POSITIONS, E, torch.float64).log()).log()
    firsts = [largest(row, 1)[0] for row in logits]
    return [
        [first, next(e for e in largest(row + noise[t], 2) if e != first)]
        for t, (first, row) in enumerate(zip(firsts, logits, strict=True))
    ]


CASES: dict[str, tuple[str, int, dict[str, Any], Any, bool, int, bool]] = {
    # name: (moe_type, k, keys, order, the second choice has noise, capacity, how weights are normalized)
    "probs": ("Dropless", 2, {"capacity_factor": 0.7}, by_weight, False, 7, False),
    "position": ("Dropless", 3, {"capacity_factor": 0.5, "drop_policy": "position"}, by_position, False, 7, False),
    "padded": ("Dropless", 2, {"capacity_factor": 1.0, "drop_and_pad": True}, by_weight, False, 9, False),
    "megablocks": ("MegaBlock", 2, {"capacity_factor": 0.9}, by_position, False, 8, False),
    "top 1": ("GShard", 1, {"use_fused_gating": False, "min_capacity": 3}, by_chance, False, 5, True),
    "top 1 in order": ("GShard", 1, {"use_fused_gating": False, "use_rts": False}, by_choice, False, 5, True),
    "top 1 fused": ("GShard", 1, {"capacity_factor": 0.5}, by_choice, False, 4, True),
    "top 2": ("GShard", 2, {"use_fused_gating": False, "capacity_factor": 0.8}, by_choice, True, 8, True),
    "top 2 fused": ("GShard", 2, {"capacity_factor": 0.8}, by_choice, False, 8, True),
    "top 3": ("GShard", 3, {"capacity_factor": 0.6, "use_fused_gating": False}, by_choice, False, 9, True),
}


def by_hand(layer: MoeFeedForward, x: Tensor, name: str) -> tuple[Tensor, int, Tensor]:
    """Output, number of dropped choices, and the balance loss."""
    moe_type, k, keys, order, has_noise, capacity, renormalizes = CASES[name]
    flat = x.flatten(0, 1)
    logits = flat @ layer.router.weight.T
    p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    experts = with_second_by_noise(logits.detach()) if has_noise else [largest(row, k) for row in p.detach()]
    kept: list[set[int]] = [set() for _ in range(T)]
    taken = [0] * E
    for _, t, i in sorted(order(p.detach(), experts)):
        expert = experts[t][i]
        if taken[expert] < capacity:
            taken[expert] += 1
            kept[t].add(expert)
    rows = []
    for t, token in enumerate(flat):
        if moe_type == "GShard" and k == 1 and not keys.get("use_fused_gating", True):
            total = torch.ones(())
        else:
            total = sum((p[t, e] for e in (kept[t] if renormalizes else experts[t])), torch.zeros(()))
        out = torch.zeros_like(token)
        for e in sorted(kept[t]):
            gate, up = layer.experts.w13[e][:F] @ token, layer.experts.w13[e][F:] @ token
            out = out + p[t, e] / total * (layer.experts.w2[e] @ (gate / (1 + torch.exp(-gate)) * up))
        rows.append(out)
    counted = [row[:1] if moe_type == "GShard" else row for row in experts]
    counts = torch.tensor([sum(row.count(e) for row in counted) for e in range(E)], dtype=torch.float64)
    balance = E * (counts / counts.sum() * p.mean(0)).sum()
    return torch.stack(rows).view_as(x), T * k - sum(map(len, kept)), balance


@pytest.mark.parametrize("name", CASES)
def test_experts_take_tokens_up_to_their_capacity(name: str) -> None:
    moe_type, k, keys, *_ = CASES[name]
    layer, x = layer_of(moe_type, k, **keys), tokens()
    begin(layer, RouterLosses(balance=0.3))
    ours = layer(x)
    theirs, num_dropped, balance = by_hand(layer, x, name)
    assert 0 < num_dropped == layer.router.sums().dropped
    torch.testing.assert_close(ours, theirs)
    # `out.square().sum()` with the loss that the router adds.
    weights = [*layer.parameters(), x]
    expected = torch.autograd.grad(theirs.square().sum() + 0.3 * balance, weights)
    for one, other in zip(torch.autograd.grad(ours.square().sum(), weights), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_evaluation_has_its_own_factor_and_no_noise() -> None:
    keys = {"capacity_factor": 0.5, "use_fused_gating": False, "noisy_gate_policy": "Jitter"}
    layer, x = layer_of("GShard", 2, **keys, eval_capacity_factor=4.0), tokens()
    plain = layer_of("Dropless", 2)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x))
    layer.train()
    assert not torch.allclose(layer(x), plain(x))


@pytest.mark.parametrize("has_gradients", [True, False])
def test_the_factor_is_that_of_the_mode(has_gradients: bool) -> None:
    """With or without gradients: a forward pass to be recomputed has none, and evaluation may have them."""
    layer, x = layer_of("GShard", 2, capacity_factor=0.5, eval_capacity_factor=4.0), tokens().flatten(0, 1)
    with torch.set_grad_enabled(has_gradients):
        trained, evaluated = (layer.train(mode).router(x, B).kept for mode in (True, False))
    assert trained is not None and evaluated is not None
    # ceil(0.5 * 2 * 18 / 4) choices of each expert at most.
    assert int(trained.sum()) <= 5 * E < int(evaluated.sum()) == 2 * T


@pytest.mark.parametrize("moe_type", ["GShard", "Dropless", "MegaBlock-Dropless", "MegaBlock-D"])
def test_without_a_capacity_all_kinds_of_layers_are_the_same(moe_type: str) -> None:
    keys: dict[str, Any] = {"drop_tokens": False, "capacity_factor": 0.1} if moe_type == "GShard" else {}
    x = tokens()
    assert torch.equal(layer_of(moe_type, 2, **keys)(x), layer_of("Dropless", 2)(x))


@pytest.mark.parametrize("dtype", ["torch.float64", "torch.bfloat16"])
def test_nothing_is_kept(dtype: str) -> None:
    layer = layer_of("MegaBlock", 2, dtype, capacity_factor=0.01)
    x = tokens().detach().to(layer.experts.w13.dtype).requires_grad_()
    out = layer(x)
    assert torch.equal(out, torch.zeros_like(x)) and layer.router.sums().dropped == 2 * T
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(layer, out, x))


def gradients(layer: MoeFeedForward, out: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out - 1).square().sum(), [*layer.parameters(), x])


def test_bf16_is_the_rounded_result() -> None:
    """A rounding errs by at most u = 2^-8 of the value, and n independent ones by u sqrt(n / 3) in the quadratic mean.

    Six are on the way to an output (gate, up, their product, w2, weight, sum), and six more on that to a gradient. A
    gradient of the router is a difference of two numbers with the errors of a gradient.
    """
    keys = {"capacity_factor": 0.6}
    layer, wide = layer_of("GShard", 3, "torch.bfloat16", **keys), layer_of("GShard", 3, "torch.float32", **keys)
    x = tokens().detach().bfloat16().requires_grad_()
    y = x.detach().float().requires_grad_()
    with torch.no_grad():
        for weight, other in zip(wide.parameters(), layer.parameters(), strict=True):
            weight.copy_(other)
    out, expected = layer(x), wide(y)
    assert relative_error(out, expected) < 2**-8 * (6 / 3) ** 0.5
    router, *others = zip(gradients(layer, out, x), gradients(wide, expected, y), strict=True)
    assert all(relative_error(one, other) < 2**-8 * (12 / 3) ** 0.5 for one, other in others)
    assert relative_error(*router) < 2 * 2**-8 * (12 / 3) ** 0.5


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def test_equal_tokens_are_taken_from_the_first() -> None:
    layer = layer_of("Dropless", 1, capacity_factor=1.0, normalize_expert_weights=False)
    x = tokens().detach()[:, :1].expand(B, S, H).contiguous()
    x = x[:1].expand_as(x) * (1 + 1e-15 * torch.randn(B, S, 1, dtype=torch.float64))
    kept = layer.router(x.flatten(0, 1), B).kept
    assert kept.flatten().tolist() == [True] * 5 + [False] * (T - 5)


@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.float64, 2.0**-36), (torch.float32, 2.0**-16), (torch.bfloat16, 2.0**-16)], ids=str
)
def test_weights_are_compared_in_steps(dtype: torch.dtype, step: float) -> None:
    """Weights that round to the same multiple of the step tie: the first token is kept."""
    for more, keeps_first in ((-1.0, True), (0.0, True), (0.375, True), (1.0, False), (2.0, False)):
        weights = torch.tensor([[2.0**-12], [2.0**-12 + more * step]], dtype=dtype)
        assert float(weights[1] - weights[0]) == more * step
        keys = Capacity(1.0, 1.0).keys(torch.zeros(2, 1, dtype=torch.int64), weights, 0, torch.arange(2))
        kept = kept_choices(keys, 1, E, SamplePart(), torch.arange(2))
        assert kept.flatten().tolist() == [keeps_first, not keeps_first]


def test_a_shared_sample_is_that_of_one_rank() -> None:
    """Which of the own choices are kept, for equal parts of each row, and for tokens that are dealt in any order."""
    rows = [SamplePart(index, 3).positions(T // 3, B, torch.device("cpu")) for index in range(3)]
    assert [own.tolist() for own in rows] == [[0, 1, 2, 9, 10, 11], [3, 4, 5, 12, 13, 14], [6, 7, 8, 15, 16, 17]]
    capacity = Capacity(0.5, 0.5, priority="position")
    experts = torch.randint(0, E, (T, 2), generator=torch.Generator().manual_seed(4))
    # Equal keys of an expert: the first tokens of the sample are kept, not those of the first rank.
    keys = capacity.keys(experts, torch.ones(T, 2), 0, torch.arange(T))
    kept = kept_choices(keys, 4, E, SamplePart(), torch.arange(T))
    assert 0 < int(kept.sum()) < 2 * T
    for dealt in (rows, [*torch.randperm(T, generator=torch.Generator().manual_seed(5)).view(3, -1)]):
        everything = torch.cat([torch.cat((own[:, None], keys[own]), dim=1) for own in dealt])
        for index, own in enumerate(dealt):
            part = SamplePart(index, 3, lambda values, everything=everything: everything)
            assert torch.equal(part.joined(keys[own], own), keys)
            assert torch.equal(kept_choices(keys[own], 4, E, part, own), kept[own])


@pytest.mark.parametrize(
    ("factor", "num_tokens", "least", "rounds_up", "rows"),
    [
        (1.0, 32, 0, True, 16),
        (1.1, 20, 0, True, 11),  # 1.1 * 2 * 20 / 4 is above 11 in floating point
        (1.1, 20, 0, False, 11),
        (1.25, 17, 0, True, 11),
        (1.25, 17, 0, False, 10),
        (0.01, 4, 3, True, 3),
        (1e-3, 0, 0, True, 0),
    ],
)
def test_the_capacity_is_exact(factor: float, num_tokens: int, least: int, rounds_up: bool, rows: int) -> None:
    capacity = Capacity(factor, 2.0, least, rounds_up=rounds_up)
    assert capacity.rows(num_tokens, 4, 2, is_training=True) == rows
    assert capacity.rows(torch.tensor(num_tokens), 4, 2, is_training=True) == rows
    assert capacity.rows(num_tokens, 4, 2, is_training=False) == max(num_tokens, least)


@pytest.mark.parametrize("keys", [{"drop_policy": "position"}, {}], ids=["position", "probs"])
def test_padding_takes_no_capacity(keys: dict[str, Any]) -> None:
    layer, x = layer_of("Dropless", 2, capacity_factor=0.6, **keys), tokens()[:1]
    valid = torch.arange(S) % 3 != 1
    alone = layer(x[:, valid])
    num_dropped = int(layer.router.sums().dropped)
    begin(layer)
    layer.router.sample = SampleTokens(valid=valid, num_valid=valid.sum())
    out = layer(x)
    torch.testing.assert_close(out[:, valid], alone)
    assert torch.equal(out[:, ~valid], torch.zeros_like(out[:, ~valid]))
    assert 0 < num_dropped == layer.router.sums().dropped
