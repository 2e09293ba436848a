"""The order of tokens by expert, against sums over dense one-hot matrices in float64; equal bits in every run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from internlm.model.moe import expert_order
from internlm.model.moe.expert_order import ExpertOrder, combine, dispatch

SIZES = [(0, 2, 4), (1, 1, 1), (7, 1, 3), (13, 3, 5), (40, 8, 8), (64, 2, 200)]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _experts(num_tokens: int, top_k: int, num_experts: int, seed: int = 0) -> Tensor:
    """Distinct experts of each token."""
    scores = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(dim=1)[:, :top_k]


def _one_hot(order: ExpertOrder, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[T * k, T]`: which row is a copy of which token, from `order` alone."""
    num_tokens = len(order.order) // order.top_k
    return torch.eye(num_tokens, dtype=dtype)[[pair // order.top_k for pair in order.order.tolist()]]


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), SIZES)
def test_rows_are_sorted_by_expert_then_by_token(num_tokens: int, top_k: int, num_experts: int) -> None:
    experts = _experts(num_tokens, top_k, num_experts)
    order = ExpertOrder.of(experts, num_experts)
    pairs = sorted(range(num_tokens * top_k), key=lambda pair: (int(experts[pair // top_k, pair % top_k]), pair))
    assert order.order.tolist() == pairs
    assert [pairs[row] for row in order.inverse.tolist()] == list(range(num_tokens * top_k))
    assert order.counts.tolist() == [int((experts == expert).sum()) for expert in range(num_experts)]
    assert order.top_k == top_k
    assert {x.dtype for x in (order.order, order.inverse, order.counts)} == {torch.int64}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), SIZES)
def test_dispatch(num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype) -> None:
    order = ExpertOrder.of(_experts(num_tokens, top_k, num_experts), num_experts)
    x = _random(num_tokens, 24, dtype=dtype).requires_grad_()
    grad = _random(num_tokens * top_k, 24, seed=1, dtype=dtype)
    out = dispatch(x, order)
    out.backward(grad)
    copies = _one_hot(order)
    assert torch.equal(out.detach().double(), copies @ x.detach().double())
    _rounded_once(x.grad, copies.t() @ grad.double(), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), SIZES)
def test_combine(num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype) -> None:
    order = ExpertOrder.of(_experts(num_tokens, top_k, num_experts), num_experts)
    y = _random(num_tokens * top_k, 24, dtype=dtype).requires_grad_()
    weights = _random(num_tokens, top_k, seed=1, dtype=torch.float32).requires_grad_()
    grad = _random(num_tokens, 24, seed=2, dtype=dtype)
    out = combine(y, weights, order)
    out.backward(grad)
    # The same sum, as a dense matrix with one weight for each row.
    exact_y, exact_weights = (x.detach().double().requires_grad_() for x in (y, weights))
    weighted = _one_hot(order) * exact_weights.flatten()[order.order].unsqueeze(1)
    exact = weighted.t() @ exact_y
    exact.backward(grad.double())
    _rounded_once(out.detach(), exact.detach(), dtype)
    _rounded_once(y.grad, exact_y.grad, dtype)
    _rounded_once(weights.grad, exact_weights.grad, torch.float32)


def _rounded_once(found: Tensor | None, exact: Tensor | None, dtype: torch.dtype) -> None:
    """Within half a unit in the last place, and the error of an fp32 sum."""
    assert found is not None and exact is not None and found.dtype == dtype and found.shape == exact.shape
    error = 0.5 * torch.finfo(dtype).eps
    summing = 1e-5 if dtype != torch.float64 else 1e-14
    torch.testing.assert_close(found.double(), exact, rtol=error * 1.01, atol=summing)


@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients_by_differences(top_k: int) -> None:
    order = ExpertOrder.of(_experts(5, top_k, 4), 4)
    x, y, weights = (_random(*shape).requires_grad_() for shape in ((5, 3), (5 * top_k, 3), (5, top_k)))
    assert torch.autograd.gradcheck(lambda x: dispatch(x, order), (x,))
    assert torch.autograd.gradcheck(lambda y, weights: combine(y, weights, order), (y, weights))


def _all_results(dtype: torch.dtype) -> list[Tensor]:
    order = ExpertOrder.of(_experts(200, 4, 16), 16)
    x, weights = _random(200, 40, dtype=dtype).requires_grad_(), _random(200, 4, dtype=torch.float32).requires_grad_()
    rows = dispatch(x, order)
    out = combine(rows.sin(), weights, order)
    return [rows, out, *torch.autograd.grad(out, (x, weights), _random(200, 40, seed=3, dtype=dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_run_and_every_size_of_block_gives_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _all_results(dtype)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert all(map(torch.equal, _all_results(dtype), expected))
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setitem(expert_order._BLOCK, "cpu", 300)
    assert all(map(torch.equal, _all_results(dtype), expected))


def test_expanded_gradients_and_views() -> None:
    """The gradient of a sum has strides of 0; rows may be columns of a wider matrix."""
    order = ExpertOrder.of(_experts(6, 2, 4), 4)
    x, y = _random(6, 10)[:, 1:4].requires_grad_(), _random(12, 10)[:, 1:4].requires_grad_()
    weights = _random(6, 2, dtype=torch.float32).t().contiguous().t().requires_grad_()
    (dispatch(x, order).sum() + combine(y, weights, order).sum()).backward()
    assert x.grad is not None and y.grad is not None and weights.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    torch.testing.assert_close(y.grad, weights.detach().double().flatten()[order.order].unsqueeze(1).expand(-1, 3))
    torch.testing.assert_close(weights.grad.double(), y.detach().sum(1)[order.inverse].view(6, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph_when_compiled(dtype: torch.dtype) -> None:
    def routed(x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        order = ExpertOrder.of(experts, 6)
        return combine(dispatch(x, order).sin(), weights, order)

    torch._dynamo.reset()
    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (9, 14):
        x = _random(num_tokens, 8, dtype=dtype).requires_grad_()
        weights = _random(num_tokens, 2, dtype=torch.float32).requires_grad_()
        experts = _experts(num_tokens, 2, 6)
        grad = _random(num_tokens, 8, seed=1, dtype=dtype)
        found, expected = (
            [out.detach(), *torch.autograd.grad(out, (x, weights), grad)]
            for out in (call(x, weights, experts) for call in (compiled, routed))
        )
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dropped_pairs_have_no_gradient(dtype: torch.dtype) -> None:
    experts = torch.tensor([[0, 1], [0, 2], [1, 0]])
    kept = torch.tensor([[True, True], [True, False], [True, False]])
    order = ExpertOrder.of(experts, 3, kept)
    y, weights = torch.randn(len(order.order), 8, dtype=dtype), torch.rand(3, 2).where(kept, 0.0).requires_grad_()
    (grad,) = torch.autograd.grad(combine(y, weights, order).sum(), weights)
    assert torch.equal(grad != 0, kept)
    expected = y.double().sum(-1)[order.inverse.view(3, 2)][kept].float()
    torch.testing.assert_close(grad[kept], expected)
