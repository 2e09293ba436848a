"""Attention that also returns the log-sum-exp of its scores, with which parts over the keys can be merged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.ops.attention.causal_attention import VarlenMetadata, attention

LENGTHS = (5, 1, 0, 9)


def by_hand(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """`[S, H]`: each query's scores of the keys of its document that it sees, one by one."""
    group, rows = q.shape[2] // k.shape[2], []
    start = 0
    for length in LENGTHS:
        for own in range(length):
            first = 0 if window is None else max(0, own - window + 1)
            keys = k[0, start + first : start + own + 1].repeat_interleave(group, dim=1)
            scores = (q[0, start + own] * keys).sum(-1) / math.sqrt(q.shape[-1])
            rows.append(scores.exp().sum(0).log())
        start += length
    return torch.stack(rows)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(3)
    shapes = ((1, 15, 4, 8), (1, 15, 2, 8), (1, 15, 2, 8))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("window", [None, 3])
def test_the_log_sum_exp_is_that_of_the_formula(window: int | None) -> None:
    q, k, v = inputs(torch.float64)
    varlen = VarlenMetadata.of(LENGTHS)
    out, lse = attention(q, k, v, varlen, window=window, return_lse=True)
    plain = attention(q, k, v, varlen, window=window)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(lse[0], by_hand(q, k, window))
    grads = torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(plain.square().sum(), (q, k, v)))
    mine, theirs = (torch.autograd.grad(x.square().sum(), (q, k)) for x in (lse, by_hand(q, k, window)))
    torch.testing.assert_close(mine, theirs)


def test_parts_over_the_keys_merge_into_the_whole() -> None:
    """The second half of the queries sees its own keys causally and all keys of the first half."""
    q, k, v = (x.detach() for x in inputs(torch.float64))
    q, k, v = q[:, :8], k[:, :8], v[:, :8]
    whole = attention(q, k, v)
    own, own_lse = attention(q[:, 4:], k[:, 4:], v[:, 4:], return_lse=True)
    # All earlier keys: one query at a time, as cached keys are seen.
    earlier = [attention(q[:, s : s + 1], k[:, :4], v[:, :4], return_lse=True) for s in range(4, 8)]
    other, other_lse = (torch.cat(parts, dim=1) for parts in zip(*earlier, strict=True))
    share = torch.sigmoid(own_lse - other_lse).unsqueeze(-1)
    torch.testing.assert_close(share * own + (1 - share) * other, whole[:, 4:])


def test_16_bit_inputs_have_an_fp32_log_sum_exp() -> None:
    q, k, v = (x.detach() for x in inputs(torch.bfloat16))
    out, lse = attention(q, k, v, VarlenMetadata.of(LENGTHS), return_lse=True)
    assert (out.dtype, lse.dtype, tuple(lse.shape)) == (torch.bfloat16, torch.float32, (1, 15, 4))
    torch.testing.assert_close(lse[0], by_hand(q.float(), k.float(), None))


def test_a_backend_without_it_is_refused_by_name() -> None:
    class OnCuda(Tensor):
        is_cuda = True  # type: ignore[assignment]

    q, k, v = (x.detach().as_subclass(OnCuda) for x in inputs(torch.float32))
    with pytest.raises(ValueError, match=r"attention\(return_lse=True\): the backend 'flex' does not return"):
        attention(q, k, v, VarlenMetadata.of(LENGTHS), attention_backend="flex", return_lse=True)


@pytest.mark.parametrize("varlen", [None, VarlenMetadata.of(LENGTHS)], ids=["row", "packed"])
def test_another_scale_is_that_of_both_results(varlen: VarlenMetadata | None) -> None:
    q, k, v = (x.detach() for x in inputs(torch.float64))
    out, lse = attention(q, k, v, varlen, scale=0.7, return_lse=True)
    expected = attention(q * (0.7 * math.sqrt(q.shape[-1])), k, v, varlen, return_lse=True)
    torch.testing.assert_close((out, lse), expected)
    torch.testing.assert_close(out, attention(q, k, v, varlen, scale=0.7))


def test_inner_attention_returns_it() -> None:
    q, k, v = (torch.randn(1, sum(LENGTHS), heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    varlen = VarlenMetadata.of(LENGTHS)
    inner = InnerAttention(3, "auto", use_flash_attn=False)
    out, lse = inner.forward_with_lse(q, k, v, varlen)
    expected = attention(q, k, v, varlen, window=3, return_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    torch.testing.assert_close(out, inner(q, k, v, varlen))
