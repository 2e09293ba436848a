"""The C++ attention kernel against its formula in float64, on whatever lengths, heads, windows, strides there are."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from internlm.model.ops import reference
from internlm.model.ops.attention import causal_attention as attention_module
from internlm.model.ops.attention.cuda_backends import AttentionNeeds
from internlm.model.ops.cpu import native
from internlm.model.ops.cpu.attention import cpu_attention
from internlm.model.ops.self_test import OpCase, judge
from internlm.utils.cpp_extension import CompileError

CPU = torch.device("cpu")

needs_native_ops = pytest.mark.skipif(not native.has_native_ops(), reason="this CPU does not multiply bf16 in hardware")


def test_it_is_there_where_the_cpu_is_made_for_it() -> None:
    """Test machines have a compiler."""
    assert native.has_native_ops() == native.has_bf16_units()


def _case(lengths: list[int], heads: tuple[int, int], head_dim: int, window: int | None, scale: float | None) -> OpCase:
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return OpCase(
        "attention",
        "native",
        partial(cpu_attention, cu_seqlens=bounds, window=window, scale=scale, kernel="native"),
        partial(reference.attention, cu_seqlens=bounds, window=window, scale=scale),
        tuple((1, sum(lengths), number, head_dim) for number in (heads[0], heads[1], heads[1])),
    )


@needs_native_ops
@settings(max_examples=60, deadline=None)
@given(
    # Of a few scores the error is chance, and so is what `judge` allows: errors of the formula, of as few.
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=4).filter(lambda lengths: sum(lengths) >= 32),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 130),
    window=st.none() | st.integers(1, 310),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 1000),
)
def test_packed_documents(
    lengths: list[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None,
    scale: float | None,
    seed: int,
) -> None:
    case = _case(lengths, (kv_heads * group, kv_heads), head_dim, window, scale)
    assert judge(case, CPU, torch.bfloat16, seed) is None


@needs_native_ops
@pytest.mark.parametrize("lengths", [[64], [65], [256], [257], [320, 63, 1, 128]])
@pytest.mark.parametrize("window", [None, 1, 64, 65, 256])
def test_lengths_and_windows_at_the_edges_of_blocks(lengths: list[int], window: int | None) -> None:
    assert judge(_case(lengths, (2, 1), 32, window, None), CPU, torch.bfloat16) is None


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _results(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    out, lse = torch.ops.internlm_native.attention(q, k, v, None, None, 0.1)
    grads = torch.ops.internlm_native.attention_backward(grad, q, k, v, out, lse, None, None, 0.1)
    return out, lse, *grads


@needs_native_ops
def test_rows_are_documents() -> None:
    q, k, v, grad = (
        _random(3, 100, 4, 20),
        _random(3, 100, 2, 20, seed=1),
        _random(3, 100, 2, 20, seed=2),
        _random(3, 100, 4, 20, seed=3),
    )
    together = _results(q, k, v, grad)
    for row in range(3):
        alone = _results(*(x[row : row + 1] for x in (q, k, v, grad)))
        assert all(torch.equal(mine[row : row + 1], its) for mine, its in zip(together, alone, strict=True))


@needs_native_ops
def test_any_number_of_threads_gives_the_same_bits() -> None:
    inputs = (
        _random(2, 200, 6, 32),
        _random(2, 200, 3, 32, seed=1),
        _random(2, 200, 3, 32, seed=2),
        _random(2, 200, 6, 32),
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _results(*inputs)
        torch.set_num_threads(5)
        five = _results(*inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(mine, its) for mine, its in zip(one, five, strict=True))


@needs_native_ops
def test_strides() -> None:
    """Queries, keys and values as parts of one projection, and the gradient of a sum, which has strides of zero."""
    qkv = _random(2, 70, 2, 4, 24).requires_grad_()
    q, k, v = qkv[:, :, :, :2].flatten(2, 3), qkv[:, :, :, 2], qkv[:, :, :, 3]
    attend = partial(cpu_attention, cu_seqlens=None, window=None, scale=None, kernel="native")
    (grad,) = torch.autograd.grad(attend(q, k, v).sum(), qkv)
    q, k, v = (x.detach().contiguous().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert torch.equal(grad, torch.cat((grads[0].unflatten(2, (2, 2)), *(x.unsqueeze(3) for x in grads[1:])), dim=3))


@needs_native_ops
def test_log_sum_exp() -> None:
    q, k, v = _random(1, 150, 2, 40), _random(1, 150, 2, 40, seed=1), _random(1, 150, 2, 40, seed=2)
    _, lse = torch.ops.internlm_native.attention(q, k, v, None, None, 0.2)
    scores = 0.2 * torch.einsum("bihd,bjhd->bhij", q.double(), k.double())
    truth = scores.masked_fill(torch.ones(150, 150).triu(1).bool(), -math.inf).logsumexp(-1)
    # Scores are sums of 40 products in fp32 and of size 2: a few of its roundings; exponentials are good to 1e-6.
    torch.testing.assert_close(lse.double(), truth, rtol=0, atol=1e-5)


@needs_native_ops
def test_large_scores() -> None:
    """Exponentials of what is far below the largest score are zero, and nothing overflows."""
    q, k, v = 100 * _random(1, 90, 1, 16), 100 * _random(1, 90, 1, 16, seed=1), _random(1, 90, 1, 16, seed=2)
    out, lse, *grads = _results(q, k, v, _random(1, 90, 1, 16, seed=3))
    assert all(x.isfinite().all() for x in (out, lse, *grads))
    best = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()).masked_fill(
        torch.ones(90, 90).triu(1).bool(), -math.inf
    )
    assert torch.equal(out, v[:, best[0, 0].argmax(-1)])


@needs_native_ops
def test_no_tokens() -> None:
    empty = [x[:, :0] for x in (_random(2, 1, 2, 8), _random(2, 1, 1, 8), _random(2, 1, 1, 8), _random(2, 1, 2, 8))]
    assert [x.shape for x in _results(*empty)] == [(2, 0, 2, 8), (2, 2, 0), (2, 0, 2, 8), (2, 0, 1, 8), (2, 0, 1, 8)]


def test_without_a_compiler_the_log_says_what_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise CompileError("no C++ compiler was found (g++ or clang++)")

    monkeypatch.setattr(native, "has_bf16_units", lambda: True)
    monkeypatch.setattr(attention_module, "has_bf16_units", lambda: True)
    monkeypatch.setattr(native, "compile_library", refuse)
    native.why_no_native_ops.cache_clear()
    try:
        choice = attention_module.choice(CPU, AttentionNeeds(None, torch.bfloat16, 64))
        assert choice.implementation.startswith("SDPA")
        assert "no C++ kernel: no C++ compiler was found" in choice.reason
        assert "bf16 and generation are slower than possible" in caplog.text
    finally:
        native.why_no_native_ops.cache_clear()
