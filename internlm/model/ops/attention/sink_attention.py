"""Causal attention with a learned logit per head in the denominator of the softmax, an attention sink.

With scores s_ij of the keys that query i sees and the sink b of its head, the weights are

    p_ij = exp(s_ij) / (exp(b) + sum over j of exp(s_ij)),

so the result is that of plain attention times sigmoid(lse_i - b), where lse is the log-sum-exp of the scores. Source:
gpt-oss, https://arxiv.org/abs/2508.10925; Xiao et al. 2023, https://arxiv.org/abs/2309.17453, has a sink in all heads.

The backward pass of flash attention, given the result with the sink and the log-sum-exp with it, computes the gradients
of q, k and v: it recomputes p_ij from the latter, and needs the former for the sum over j of p_ij dL/dp_ij.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from internlm.model.ops.attention.causal_attention import VarlenMetadata, attention
from internlm.model.ops.cpu import attention as cpu


def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, varlen: VarlenMetadata | None = None, *, window: int | None = None
) -> Tensor:
    """Causal softmax attention with a sink in each head.

    On a CPU without a window, memory grows with the number of tokens; otherwise with the square of the longest
    document, as the log-sum-exp is that of the reference implementation.

    Args:
        q: `[B, S, H, D]`.
        k, v: `[B, T, K, D]`; see `attention`.
        sinks: `[H]`.
        varlen, window: see `attention`.

    Returns:
        `[B, S, H, D]` in the dtype of q.
    """
    if window is not None and window >= k.shape[1]:
        window = None
    if q.device.type == "cpu" and window is None and q.shape[1] == k.shape[1] and not torch.compiler.is_compiling():
        bounds = None if varlen is None else varlen.cu_seqlens
        result: Tensor = _SinkAttention.apply(q, k, v, sinks, bounds)
        return result
    out, lse = attention(q, k, v, varlen, window=window, return_lse=True)
    return (out * (lse - sinks.to(lse.dtype)).sigmoid().unsqueeze(-1)).to(q.dtype)


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        scale = 1 / math.sqrt(q.shape[-1])
        out, lse = cpu._attention(q, k, v, cu_seqlens, None, scale, "flash")
        sink = sinks.to(lse.dtype)[:, None]
        out = (out * (lse - sink).sigmoid().transpose(1, 2).unsqueeze(-1)).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, torch.logaddexp(lse, sink), cu_seqlens)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse, cu_seqlens = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        grads = cpu._attention_backward(grad, q, k, v, out, lse, cu_seqlens, None, scale, "flash")
        # The sink has the value 0, so its weight's gradient lacks the term dL/dp.
        weights = (sinks.to(lse.dtype)[:, None] - lse).exp().transpose(1, 2)
        products = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        return *grads, -(weights * products).sum((0, 1)).to(sinks.dtype), None
