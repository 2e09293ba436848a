"""An expert layer against a loop over tokens and experts in plain PyTorch, and what its router adds to the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.configs import small_config
from torch import Tensor, nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.model.moe.feed_forward import MoeFeedForward
from internlm.model.moe.router import RouterLosses
from internlm.model.moe.sample_tokens import SampleTokens
from internlm.model.registry import build_model

E, K, H, F = 5, 2, 16, 24


def layer_of(family: str, **changes: Any) -> MoeFeedForward:
    """The expert layer of a small model in float64, with weights large enough that experts and gates matter."""
    keys = {
        "model_type": family,
        "model.dtype": "torch.float64",
        "model.hidden_size": H,
        "model.num_attention_heads": 2,
        "model.num_kv_attention_heads": 2,
        "model.intermediate_size": F,
        "model.num_experts": E,
        "model.top_k": K,
        "model.moe_type": "Dropless",
        **{f"model.{name}": value for name, value in changes.items()},
    }
    with torch.device("meta"):
        model = build_model(family, small_config(keys).model)
    parallelize(model, ParallelContext.create())
    layer = model.layers["0"].feed_forward  # type: ignore[union-attr, index]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(0, 0.5, generator=generator)
    assert isinstance(layer, MoeFeedForward)
    return layer


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def by_hand(layer: MoeFeedForward, x: Tensor, normalizes: bool = True, scale: float = 1.0) -> Tensor:
    """Every token through every expert of its own, one after the other."""
    rows = []
    for token in x.flatten(0, 1):
        scores = torch.exp(layer.router.weight @ token)
        scores = scores / scores.sum()
        chosen = sorted(range(E), key=lambda expert: (-scores[expert].item(), expert))[:K]
        total = sum(scores[expert] for expert in chosen) if normalizes else 1.0
        out = torch.zeros_like(token)
        for expert in chosen:
            gate, up = layer.experts.w13[expert][:F] @ token, layer.experts.w13[expert][F:] @ token
            out = out + scale * scores[expert] / total * (layer.experts.w2[expert] @ (silu(gate) * up))
        rows.append(out + 0)
    return torch.stack(rows).view_as(x)


def with_shared(layer: MoeFeedForward, x: Tensor, routed: Tensor, mix: str) -> Tensor:
    shared = layer.shared
    assert shared is not None and isinstance(layer.shared_gate, nn.Linear)
    dense = (silu(x @ shared.w1.weight.T) * (x @ shared.w3.weight.T)) @ shared.w2.weight.T
    gate = x @ layer.shared_gate.weight.T
    if mix == "sigmoid":
        return routed + dense / (1 + torch.exp(-gate))
    parts = torch.exp(gate + layer.shared_gate.bias)
    parts = parts / parts.sum(-1, keepdim=True)
    return routed * parts[..., :1] + dense * parts[..., 1:]


def gradients(layer: MoeFeedForward, out: Tensor, x: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in layer.named_parameters()]
    grads = torch.autograd.grad(out.square().sum(), [*layer.parameters(), x])
    return dict(zip([*names, "x"], grads, strict=True))


@pytest.mark.parametrize("normalizes, scale", [(True, 1.0), (False, 1.0), (True, 2.5)])
def test_it_is_the_sum_over_its_experts(normalizes: bool, scale: float) -> None:
    keys = {"normalize_expert_weights": normalizes, "routed_scaling_factor": scale}
    layer = layer_of("QWEN3MOE", moe_layer_kwargs=keys)
    x = torch.randn(2, 7, H, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(x), by_hand(layer, x, normalizes, scale)
    torch.testing.assert_close(ours, theirs)
    expected = gradients(layer, theirs, x)
    for name, grad in gradients(layer, ours, x).items():
        torch.testing.assert_close(grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "family, mix", [("QWEN2MOE", "sigmoid"), ("MIXTRALMOE", "softmax"), ("INTERNLM_MoE", "softmax")]
)
def test_shared_experts_join_by_their_gate(family: str, mix: str) -> None:
    layer = layer_of(family, num_shared_experts=2)
    assert layer.shared is not None and layer.shared.w1.weight.shape == (2 * F, H)
    x = torch.randn(1, 5, H, dtype=torch.float64, requires_grad=True)
    ours, theirs = layer(x), with_shared(layer, x, by_hand(layer, x), mix)
    torch.testing.assert_close(ours, theirs)
    expected = gradients(layer, theirs, x)
    for name, grad in gradients(layer, ours, x).items():
        torch.testing.assert_close(grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_losses_of_the_router_reach_it_through_the_output() -> None:
    layer = layer_of("QWEN3MOE")
    x = torch.randn(1, 9, H, dtype=torch.float64, requires_grad=True)
    layer.router.begin_step(RouterLosses(balance=0.3, z=0.7), torch.tensor(0.25))
    out = layer(x)
    got = torch.autograd.grad(out.sum(), [layer.router.weight, x])

    logits = x[0] @ layer.router.weight.T
    scores = logits.softmax(-1)
    counts = torch.zeros(E, dtype=torch.float64)
    for token in scores:
        for expert in sorted(range(E), key=lambda expert: -token[expert].item())[:K]:
            counts[expert] += 1
    balance = E * (counts / (K * 9) * scores.mean(0)).sum()
    z = torch.log(torch.exp(logits).sum(-1)).square().mean()
    total = by_hand(layer, x).sum() + 0.25 * (0.3 * balance + 0.7 * z)
    for one, other in zip(got, torch.autograd.grad(total, [layer.router.weight, x]), strict=True):
        torch.testing.assert_close(one, other)
    sums = layer.router.sums()
    assert sums.counts.tolist() == counts.tolist()
    torch.testing.assert_close(sums.losses, torch.stack([balance, z, torch.zeros_like(z)]).detach())
    torch.testing.assert_close(sums.probabilities, scores.sum(0).detach())
    torch.testing.assert_close(sums.entropy, -(scores * scores.log()).sum().detach())


def test_padding_is_not_counted_even_where_it_is_nan() -> None:
    router = layer_of("QWEN3MOE").router
    x = torch.randn(7, H, dtype=torch.float64)
    coefficients, weight = RouterLosses(balance=0.3, z=0.7, sequence=0.2), torch.tensor(0.25)
    sequences = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    router.begin_step(coefficients, weight)
    router.sample = SampleTokens(sequences=sequences, num_sequences=2)
    expected, sums = router(x).loss, router.sums().values
    padded = torch.full((10, H), torch.nan, dtype=torch.float64)
    valid = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 1, 0]).bool()
    padded[valid] = x
    router.begin_step(coefficients, weight)
    places = torch.tensor([0, 0, 0, 2, 1, 1, 2, 1, 1, 2])
    router.sample = SampleTokens(valid, torch.tensor(7), places, 3)
    torch.testing.assert_close(router(padded).loss, expected)
    torch.testing.assert_close(router.sums().values, sums)


def test_nothing_is_counted_or_added_without_a_step_or_gradients() -> None:
    layer = layer_of("QWEN3MOE")
    x = torch.randn(1, 4, H, dtype=torch.float64)
    plain = torch.autograd.grad(layer(x).sum(), layer.router.weight)
    layer.router.begin_step(RouterLosses(balance=1.0), torch.tensor(1.0))
    with torch.no_grad():
        layer(x)
    assert not layer.router.sums().values.any()
    assert not torch.equal(torch.autograd.grad(layer(x).sum(), layer.router.weight)[0], plain[0])


def test_a_router_is_in_fp32_whatever_the_model() -> None:
    layer = layer_of("QWEN3MOE", dtype="torch.bfloat16")
    assert layer.router.weight.dtype == torch.float32 and layer.experts.w13.dtype == torch.bfloat16
    assert layer(torch.randn(1, 3, H).bfloat16()).dtype == torch.bfloat16


def test_a_selection_bias_changes_choices_alone() -> None:
    layer = layer_of("QWEN3MOE", moe_layer_kwargs={"selection_bias": True})
    bias = layer.router.selection_bias
    assert bias is not None and not bias.requires_grad and bias.dtype == torch.float64
    x = torch.randn(9, H, dtype=torch.float64)
    bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0, 9.0]))
    experts, weights, *_ = layer.router(x)
    assert experts.tolist() == [[4, 3]] * 9
    scores = (x @ layer.router.weight.T).softmax(-1)[:, [4, 3]]
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))
    half = layer_of("QWEN3MOE", dtype="torch.bfloat16", moe_layer_kwargs={"selection_bias": True}).router
    assert half.selection_bias is not None and half.selection_bias.dtype == torch.float32
