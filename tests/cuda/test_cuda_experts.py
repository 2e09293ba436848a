"""Linear layers of experts and the order of tokens by expert on a GPU: right, equal in every run, and without waits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from internlm.model.moe.expert_order import ExpertOrder, combine, dispatch
from internlm.model.ops import reference
from internlm.model.ops.grouped_linear import choice, grouped_linear, weight_gradient
from internlm.model.ops.self_test import OpCase, judge

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _exact_products_and_default_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    yield
    torch.cuda.set_sync_debug_mode("default")


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _experts(num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
    return scores.argsort(dim=1)[:, :top_k].to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(256, 768), (768, 128), (8, 8), (250, 30)], ids=str)
@pytest.mark.parametrize("counts", [(0, 0, 700, 1, 0, 129, 64, 63), (1,) * 100, (0, 1000, 0), (0, 0)], ids=str)
def test_grouped_linear(counts: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype) -> None:
    own = torch.tensor(counts, device=DEVICE)
    ours, formula = (partial(call, counts=own) for call in (grouped_linear, reference.grouped_linear))
    shapes = (sum(counts), widths[0]), (len(counts), widths[1], widths[0])
    assert judge(OpCase("grouped_linear", "", ours, formula, shapes), DEVICE, dtype) is None
    x, grad = _random(*shapes[0], dtype=dtype), _random(sum(counts), widths[1], seed=1, dtype=dtype)
    assert torch.count_nonzero(weight_gradient(grad, x, own)[own == 0]) == 0


def test_strides_and_alignment() -> None:
    """Columns of a wider matrix, a weight within a flat buffer, and an expanded gradient."""
    counts = torch.tensor([40, 0, 30], device=DEVICE)
    wide, flat = _random(70, 99, dtype=torch.bfloat16), _random(3 * 64 * 32 + 1, dtype=torch.bfloat16)
    x, weight = wide[:, 1:33].requires_grad_(), flat[1:].view(3, 64, 32).requires_grad_()
    found = torch.autograd.grad(grouped_linear(x, weight, counts).sum(), (x, weight))
    x, weight = (tensor.detach().clone().requires_grad_() for tensor in (x, weight))
    ones = torch.ones(70, 64, device=DEVICE, dtype=torch.bfloat16)
    expected = torch.autograd.grad(grouped_linear(x, weight, counts), (x, weight), ones)
    torch.testing.assert_close(found, expected)


def _routed(dtype: torch.dtype) -> list[Tensor]:
    """Results and gradients of a layer of experts, without the router."""
    x, weights = _random(500, 128, dtype=dtype).requires_grad_(), _random(500, 4, seed=1).requires_grad_()
    weight = _random(16, 128, 128, seed=2, dtype=dtype).requires_grad_()
    experts, grad = _experts(500, 4, 16), _random(500, 128, seed=3, dtype=dtype)
    if choice(DEVICE, dtype, (128, 128)).implementation == "torch.nn.functional.grouped_mm":
        torch.cuda.set_sync_debug_mode("error")
    order = ExpertOrder.of(experts, 16)
    out = combine(grouped_linear(dispatch(x, order), weight, order.counts), weights, order)
    results = [order.order, order.counts, out, *torch.autograd.grad(out, (x, weight, weights), grad)]
    torch.cuda.set_sync_debug_mode("default")
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_gives_the_same_bits_and_waits_for_nothing(dtype: torch.dtype) -> None:
    expected = _routed(dtype)
    for _ in range(5):
        assert all(map(torch.equal, _routed(dtype), expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("top_k", "width"), [(1, 72), (8, 72), (3, 1500)])
def test_sums_over_the_experts_of_a_token(top_k: int, width: int, dtype: torch.dtype) -> None:
    order = ExpertOrder.of(_experts(300, top_k, 20), 20)
    copies = torch.eye(300, dtype=torch.float64, device=DEVICE)[order.order // top_k]

    def dense(y: Tensor, weights: Tensor) -> Tensor:
        return (copies * weights.flatten()[order.order].unsqueeze(1)).to(y.dtype).t() @ y

    sums = OpCase("combine", "", partial(combine, order=order), dense, ((300 * top_k, width), (300, top_k)))
    rows = OpCase("dispatch", "", partial(dispatch, order=order), lambda x: copies.to(x.dtype) @ x, ((300, width),))
    assert judge(sums, DEVICE, dtype) is None
    assert judge(rows, DEVICE, dtype) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_dropped_pairs_are_zero(dtype: torch.dtype) -> None:
    """Also where memory that was NaN is used again: renormalized weights pass them on to the kept pairs."""
    experts = _experts(300, 4, 20)
    kept = experts < 15
    order = ExpertOrder.of(experts, 20, kept)
    y = _random(len(order.order), 72, dtype=dtype)
    weights = _random(300, 4, seed=1).where(kept, 0.0).requires_grad_()
    out = combine(y, weights, order)
    blocks = [torch.full_like(weights, torch.nan, requires_grad=False) for _ in range(8)]
    del blocks
    (grad,) = torch.autograd.grad(out, weights, torch.ones_like(out))
    assert torch.equal(grad.isfinite(), torch.ones_like(kept)) and torch.count_nonzero(grad[~kept]) == 0
