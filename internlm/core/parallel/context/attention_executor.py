"""Runs attention plans: the attention of a sample whose tokens are dealt to context ranks, forward and backward.

In each step, the messages that the next steps need start before the tiles of this one are computed, so that they travel
meanwhile. Partial results are merged by log-sum-exp in fp32 (float64 for float64), and so are the gradients of keys and
values, which travel in it. In backward, the kernel gets the merged result, so that partial gradients are sums.

Source: Liu et al. 2023, https://arxiv.org/abs/2310.01889.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from internlm.core.parallel.context.attention_plan import AttentionPlan
from internlm.core.parallel.context.block_traffic import ContextGroups, GradientTraffic, KeyTraffic
from internlm.model.ops.attention.partial_attention import add_partial_attention, partial_attention_backward
from internlm.model.recompute import as_attention_operator


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    groups: ContextGroups,
    *,
    sinks: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of this rank's queries to the keys of all context ranks. Collective over them.

    Args:
        q: `[1, S, H, D]`, of the tokens that this rank owns, after rotary embedding.
        k: `[1, S, K, D]`, likewise. Query head i uses key-value head i // (H / K).
        v: `[1, S, K, D']`.
        plan: of this rank, made with the same window.
        groups: of the context ranks.
        sinks: `[H]`, the logits of attention sinks; None: none.
        window: maximum number of keys that a query sees, itself included; None: no limit.
        scale: factor on the scores; None: 1 / sqrt(D).

    Returns:
        `[1, S, H, D']` in the dtype of q.
    """
    assert q.shape[0] == 1 and q.shape[1] == plan.num_tokens, f"the plan is for {plan.num_tokens} tokens"
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    result: Tensor = _ContextAttention.apply(q, k, v, sinks, plan, groups, window, scale)
    return result


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        plan: AttentionPlan,
        groups: ContextGroups,
        window: int | None,
        scale: float,
    ) -> Tensor:
        def run() -> list[Tensor]:
            out, lse = _forward(q[0], k[0], v[0], plan, groups, window, scale)
            if sinks is not None:
                out.mul_((lse - sinks.to(lse.dtype)).sigmoid().unsqueeze(-1))
            return [out.to(q.dtype).unsqueeze(0), lse]

        out, lse = as_attention_operator(run, q)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.plan, ctx.groups, ctx.window, ctx.scale = plan, groups, window, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        grad_sinks = None
        if sinks is not None:
            # The sink is a key with the value 0; see `internlm.model.ops.attention.sink_attention`.
            sink = sinks.to(lse.dtype)
            lse = torch.logaddexp(lse, sink)
            products = (grad[0].to(lse.dtype) * out[0].to(lse.dtype)).sum(-1)
            grad_sinks = -((sink - lse).exp() * products).sum(0).to(sinks.dtype)
        grads = _backward(grad[0], q[0], k[0], v[0], out[0], lse, ctx.plan, ctx.groups, ctx.window, ctx.scale)
        grad_q, grad_k, grad_v = (grad.to(q.dtype).unsqueeze(0) for grad in grads)
        return grad_q, grad_k, grad_v, grad_sinks, None, None, None, None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    groups: ContextGroups,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`[S, H, D]` -> the merged result `[S, H, D']` and log-sum-exp `[S, H]`, in fp32 or float64."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((*q.shape[:2], v.shape[-1]), dtype=wide)
    lse = q.new_full(q.shape[:2], -math.inf, dtype=wide)
    keys = KeyTraffic(plan, groups.keys, torch.cat((k, v), dim=-1))
    widths = [k.shape[-1], v.shape[-1]]
    for number, step in enumerate(plan.steps):
        keys.begin_step(number)
        for source, tiles in step.computations:
            block_k, block_v = keys.block(source).split(widths, dim=-1)
            add_partial_attention(out, lse, q, block_k, block_v, tiles, window=window, scale=scale)
        keys.end_step(number)
    keys.finish()
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    groups: ContextGroups,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in fp32 or float64."""
    own = torch.cat((k, v), dim=-1)
    grad_own = torch.zeros_like(own, dtype=lse.dtype)
    grad_q = torch.zeros_like(q, dtype=lse.dtype)
    keys = KeyTraffic(plan, groups.keys, own)
    gradients = GradientTraffic(plan, groups.gradients, grad_own)
    widths = [k.shape[-1], v.shape[-1]]
    for number, step in enumerate(plan.steps):
        keys.begin_step(number)
        gradients.begin_step(number)
        for source, tiles in step.computations:
            block_k, block_v = keys.block(source).split(widths, dim=-1)
            grad_k, grad_v = gradients.sum_of(source).split(widths, dim=-1)
            partial_attention_backward(
                *(grad, q, block_k, block_v, out, lse, tiles),
                window=window,
                scale=scale,
                grad_q=grad_q,
                grad_k=grad_k,
                grad_v=grad_v,
            )
        keys.end_step(number)
        gradients.end_step(number)
    gradients.finish()
    keys.finish()
    grad_k, grad_v = grad_own.split(widths, dim=-1)
    return grad_q, grad_k, grad_v
