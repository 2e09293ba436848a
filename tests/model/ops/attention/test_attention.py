"""Attention against a softmax written out in float64, with every mask made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from internlm.model.ops.attention import causal_attention as attention_module
from internlm.model.ops.attention.causal_attention import VarlenMetadata, attention
from internlm.model.ops.cpu import blocked_attention as blocked_module
from internlm.model.ops.cpu.attention import CpuKernel, cpu_attention
from internlm.model.ops.cpu.native import has_native_ops

HEADS, HEAD_DIM = 6, 10
KERNELS = ["flash", "blocks", *(["native"] if has_native_ops() else [])]
"""Those of a CPU; tests/model/ops/cpu/test_native.py has more of the native one."""


def _inputs(
    batch: int, queries: int, keys: int, kv_heads: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int, heads: int) -> Tensor:
        values = torch.randn(batch, length, heads, HEAD_DIM, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    return draw(queries, HEADS), draw(keys, kv_heads), draw(keys, kv_heads)


def _reference(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | None, window: int | None) -> Tensor:
    """Softmax attention in float64 through an explicit mask."""
    num_queries, num_keys = q.shape[1], k.shape[1]
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) if lengths else torch.zeros(num_keys)
    mask = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for i in range(num_queries):
        at = num_keys - num_queries + i
        for j in range(num_keys):
            mask[i, j] = j <= at and document[j] == document[at] and (window is None or at - j < window)
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k) / math.sqrt(HEAD_DIM)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~mask, -math.inf).softmax(-1), v)


def _assert_same_with_gradients(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5), dtype=ours.dtype)
    for mine, reference in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(theirs, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("window", [None, 1, 5, 70, 1000])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_rows(kv_heads: int, window: int | None) -> None:
    inputs = _inputs(2, 150, 150, kv_heads)
    _assert_same_with_gradients(attention(*inputs, window=window), _reference(*inputs, None, window), inputs)


@pytest.mark.parametrize("window", [None, 3, 66])
@pytest.mark.parametrize("lengths", [(1,), (140,), (7, 1, 90, 7, 0, 70, 7), (30, 30, 30), (9, 30, 30, 9, 30)])
def test_packed_documents(lengths: tuple[int, ...], window: int | None) -> None:
    total = sum(lengths)
    inputs = _inputs(1, total, total, 2)
    ours = attention(*inputs, VarlenMetadata.of(lengths), window=window)
    _assert_same_with_gradients(ours, _reference(*inputs, lengths, window), inputs)


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("queries", [1, 9])
def test_cached_keys(queries: int, window: int | None) -> None:
    inputs = _inputs(3, queries, 41, 2)
    _assert_same_with_gradients(attention(*inputs, window=window), _reference(*inputs, None, window), inputs)


def test_scale() -> None:
    q, k, v = _inputs(1, 20, 20, 2)
    torch.testing.assert_close(attention(q, k, v, scale=0.5 / math.sqrt(HEAD_DIM)), attention(q * 0.5, k, v))


@pytest.mark.parametrize("window", [None, 3, 11])
@pytest.mark.parametrize("length", [1, 8, 29])
def test_blocks(monkeypatch: pytest.MonkeyPatch, length: int, window: int | None) -> None:
    monkeypatch.setattr(blocked_module, "_BLOCK", 8)
    inputs = _inputs(2, length, length, 2)
    ours = cpu_attention(*inputs, None, window=window, scale=None, kernel="blocks")
    _assert_same_with_gradients(ours, _reference(*inputs, None, window), inputs)


def test_gradient_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_module, "_BLOCK", 4)
    inputs = tuple(x[..., :4].detach().requires_grad_() for x in _inputs(1, 7, 7, 3))
    assert torch.autograd.gradcheck(lambda *x: cpu_attention(*x, None, window=5, scale=0.7, kernel="blocks"), inputs)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 30])
def test_bf16_error(monkeypatch: pytest.MonkeyPatch, kernel: CpuKernel, window: int | None) -> None:
    """Every value is a rounding or a few away from the exact one: bf16 keeps 8 bits, so a rounding is up to 2^-9 of
    the value, and probabilities, scores and results are each rounded once on the way."""
    monkeypatch.setattr(attention_module, "_cpu_kernel", lambda _: kernel)
    lengths = (100, 37, 200)
    inputs = _inputs(1, sum(lengths), sum(lengths), 2, torch.bfloat16)
    exact = _reference(*inputs, lengths, window)
    grad = torch.randn_like(exact)
    ours = attention(*inputs, VarlenMetadata.of(lengths), window=window)
    pairs = [(ours, exact)]
    pairs += zip(
        torch.autograd.grad(ours, inputs, grad.bfloat16()), torch.autograd.grad(exact, inputs, grad), strict=True
    )
    for mine, reference in pairs:
        assert (mine.double() - reference).norm() < 4 * 2**-9 * reference.norm()


@pytest.mark.parametrize(
    ("kernel", "dtype"), [("flash", torch.float32), *((kernel, torch.bfloat16) for kernel in KERNELS)]
)
@pytest.mark.parametrize("window", [None, 6])
def test_no_leak_between_documents(
    monkeypatch: pytest.MonkeyPatch, kernel: CpuKernel, dtype: torch.dtype, window: int | None
) -> None:
    monkeypatch.setattr(attention_module, "_cpu_kernel", lambda _: kernel)
    lengths = (33, 20, 33)
    inputs = _inputs(1, 86, 86, 2, dtype)
    others = tuple(
        torch.cat((y[:, :33], x[:, 33:]), 1) for x, y in zip(inputs, _inputs(1, 86, 86, 2, dtype, 9), strict=True)
    )
    first, second = (attention(*x, VarlenMetadata.of(lengths), window=window) for x in (inputs, others))
    assert torch.equal(first[:, 33:], second[:, 33:])
    assert not torch.equal(first[:, :33], second[:, :33])
