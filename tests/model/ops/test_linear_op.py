"""Linear layers against PyTorch's, and the transposed copies that weight gradients are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internlm.model.ops import linear as linear_module
from internlm.model.ops.cpu.native import has_matrix_units, has_native_ops
from internlm.model.ops.linear import linear, weight_gradient
from internlm.model.ops.self_test import OpCase, judge

needs_native_ops = pytest.mark.skipif(not has_native_ops(), reason="this CPU does not multiply bf16 in hardware")
needs_matrix_units = pytest.mark.skipif(not has_matrix_units(), reason="this CPU has no AMX: nothing is transposed")

SHAPES = [(1024, 64), (64, 1030), (1025, 1100), (70, 30)]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_as_pytorch_in_every_dtype(shape: tuple[int, int], has_bias: bool) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = [_random(2, 9, shape[1]), _random(*shape, seed=1), *([_random(shape[0], seed=2)] if has_bias else [])]
        ours, theirs = ([x.to(dtype).requires_grad_() for x in inputs] for _ in range(2))
        out, expected = linear(ours[0], ours[1], ours[2] if has_bias else None), F.linear(*theirs)
        grad = _random(2, 9, shape[0], seed=3).to(dtype)
        assert torch.equal(out, expected)
        out.backward(grad)
        expected.backward(grad)
        for mine, its in zip(ours, theirs, strict=True):
            if dtype == torch.bfloat16:
                # Sums of 18 products in fp32, in whatever order, rounded to bf16: the same but for rare ties.
                torch.testing.assert_close(mine.grad, its.grad, rtol=2**-7, atol=1e-5)
            else:
                assert torch.equal(mine.grad, its.grad)  # type: ignore[arg-type]


@needs_native_ops
@pytest.mark.parametrize(("out", "into"), [*SHAPES, (2048, 1), (1, 2048)])
@pytest.mark.parametrize("tokens", [0, 1, 31, 64, 300])
def test_weight_gradient(tokens: int, out: int, into: int) -> None:
    grad, x = _random(tokens, out).bfloat16(), _random(tokens, into, seed=1).bfloat16()
    exact = grad.double().t() @ x.double()
    ours = weight_gradient(grad, x)
    assert ours.shape == (out, into)
    # A sum of `tokens` products in fp32, where it rounds by 2^-24 of sums below the square root of their number times
    # a few, and then one rounding to bf16.
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-4)


@needs_native_ops
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposes", [False, True])
def test_weight_gradient_into_a_tensor(
    transposes: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_transposes", lambda device, dtype: transposes)
    grad, x = _random(40, shape[0]).bfloat16(), _random(40, shape[1], seed=1).bfloat16()
    out = torch.full((2, *shape), torch.nan, dtype=torch.bfloat16)
    weight_gradient(grad, x, out[1])
    assert torch.equal(out[1], weight_gradient(grad, x)) and out[0].isnan().all()


@needs_native_ops
@pytest.mark.parametrize("rows", [0, 1, 16, 31, 32, 65])
@pytest.mark.parametrize("columns", [0, 1, 15, 32, 33, 100])
def test_transposed(rows: int, columns: int) -> None:
    wide = _random(rows, columns + 5).bfloat16()
    for x in (wide[:, 3 : columns + 3], wide[:, :columns].contiguous().t().contiguous().t()):
        assert torch.equal(linear_module._transposed(x), x.t())


@needs_native_ops
def test_strides_of_a_gradient() -> None:
    """The gradient of a sum is one number with strides of zero."""
    x = _random(20, 64).bfloat16()
    grad = torch.ones((), dtype=torch.bfloat16).expand(20, 1024)
    assert torch.equal(weight_gradient(grad, x), weight_gradient(grad.contiguous(), x))
    case = OpCase(
        "linear", "transposed", lambda a, b: linear(a.t(), b, None), lambda a, b: a.t() @ b.t(), ((64, 20), (1024, 64))
    )
    assert judge(case, torch.device("cpu"), torch.bfloat16) is None


@needs_native_ops
def test_one_graph_when_compiled() -> None:
    x, weight = _random(40, 64).bfloat16().requires_grad_(), _random(1024, 64, seed=1).bfloat16().requires_grad_()
    compiled = torch.compile(
        lambda a, b: linear(a, b, None).float().square().sum(), fullgraph=True, backend="aot_eager"
    )
    grads = torch.autograd.grad(compiled(x, weight), (x, weight))
    expected = torch.autograd.grad(linear(x, weight, None).float().square().sum(), (x, weight))
    assert all(torch.equal(mine, its) for mine, its in zip(grads, expected, strict=True))


@needs_matrix_units
def test_a_second_derivative_is_refused() -> None:
    """The transposed copy has none: it would be left out without a word."""
    x, weight = _random(40, 64).bfloat16().requires_grad_(), _random(1024, 64, seed=1).bfloat16().requires_grad_()
    (gradient,) = torch.autograd.grad(linear(x, weight, None).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_native_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 45), (3, 64), (257, 1), (64, 768)])
def test_a_row_of_generation_depends_neither_on_the_others_nor_on_threads(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x, weight, bias = (x.to(dtype) for x in (_random(16, shape[1]), _random(*shape, seed=1), _random(shape[0], seed=2)))
    num_threads = torch.get_num_threads()
    with torch.inference_mode():
        alone = torch.cat([linear(row[None], weight, bias) for row in x])
        try:
            torch.set_num_threads(2)
            for count in range(1, 17):
                assert torch.equal(linear(x[:count], weight, bias), alone[:count])
        finally:
            torch.set_num_threads(num_threads)
        exact = F.linear(x.double(), weight.double(), bias.double())
        # Sums in fp32 of at most 768 products; then one rounding.
        torch.testing.assert_close(alone.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5)
        # A text's last token is a view of all of them.
        view = x.view(4, 4, -1)[:, -1]
        assert torch.equal(linear(view, weight, bias), alone[3::4])
        assert torch.equal(linear(x[5], weight, bias), alone[5])


@needs_native_ops
def test_when_the_weight_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []
    operator = torch.ops.internlm_native.linear_of_few_rows
    namespace = type("Ops", (), {"linear_of_few_rows": lambda x, *rest: calls.append(x.shape) or operator(x, *rest)})
    monkeypatch.setattr(linear_module.torch.ops, "internlm_native", namespace)
    weight = _random(8, 8, seed=1)
    linear(_random(2, 8), weight, None)
    with torch.inference_mode():
        for x, w in (
            (_random(17, 8), weight),
            (_random(2, 9, 8), weight),
            (_random(0, 8), weight),
            (_random(2, 8).double(), weight.double()),
            (_random(2, 8), _random(8, 8).t()),
        ):
            torch.testing.assert_close(linear(x, w, None), F.linear(x, w))
        assert not calls
        assert linear(_random(2, 8, 8), weight, None).shape == (2, 8, 8)
    assert calls == [(16, 8)]
