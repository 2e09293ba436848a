"""Attention between context ranks, on gloo, against PyTorch's attention in one process."""

from __future__ import annotations

import random
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from torch import Tensor
from torch.nn import functional as F

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.context import attention_executor
from internlm.core.parallel.context.attention_executor import attend
from internlm.core.parallel.context.attention_plan import AttentionPlan, make_plan, num_rows
from internlm.core.parallel.context.context_attention import context_groups
from internlm.core.parallel.context.movement import Movement, MovementName, make_movement
from internlm.core.parallel.context.token_cut import CUT_NAMES, cut_tokens
from internlm.core.parallel.context.token_pieces import TokenPieces
from internlm.model.ops.attention import partial_attention

DOCUMENTS = {
    "one": (48,),
    "several": (5, 17, 0, 9, 17),
    "tiny": (1,) * 20 + (2,) * 14,
    "one long": (1, 44, 3),
    "odd shares": (13, 8, 15),
}


def whole_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None, sinks: Tensor | None
) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(document))[:, None] - torch.arange(len(document))
    visible = (document[:, None] == document) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if sinks is not None:
        # A key whose score is the sink, with the value 0.
        k, v = (torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in (k, v))
        bias = torch.cat([bias.expand(q.shape[1], -1, -1), sinks[:, None, None].expand(-1, len(document), 1)], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True).transpose(1, 2)


def movement_of(name: MovementName, num_ranks: int) -> Movement:
    windows = tuple((i, i + 1) for i in range(0, num_ranks, 2)) if name == "double_ring" else ()
    return make_movement(name, num_ranks, windows)


def largest_error(num_ranks: int, name: MovementName, dtype: torch.dtype, kinds: list[str]) -> float:
    """Of results and gradients of this rank, over documents, cuts, heads, windows and sinks."""
    context = ParallelContext.create(ParallelLayout(world_size=num_ranks, context=num_ranks))
    groups, rank = context_groups(context), context.index("context")
    movement = movement_of(name, num_ranks)
    rng = random.Random(0)
    worst = 0.0
    for kind in kinds:
        lengths = DOCUMENTS[kind]
        for cut_name in CUT_NAMES:
            num_kv_heads, value_width = rng.choice([(4, 8), (2, 8), (1, 6)])
            window = rng.choice([None, None, 1, 7, 20])
            torch.manual_seed(rng.randint(0, 1000))
            shapes = [(4, 8), (num_kv_heads, 8), (num_kv_heads, value_width), (4, value_width)]
            *whole, grad = (torch.randn(1, sum(lengths), *shape, dtype=torch.float64) for shape in shapes)
            sinks = torch.randn(4, dtype=torch.float64) if rng.random() < 0.5 else None
            inputs = [x.requires_grad_() for x in ([*whole] if sinks is None else [*whole, sinks])]
            q, k, v = whole
            out = whole_attention(q, k, v, lengths, window, sinks)
            expected = [out.detach(), *torch.autograd.grad(out, inputs, grad)]

            cut = cut_tokens(lengths, num_ranks, cut_name)
            own = torch.from_numpy(cut.indices(rank))
            plan = make_plan(TokenPieces.of(lengths, cut), movement, rank, window)
            parts = [x.detach()[:, own].to(dtype).requires_grad_() for x in whole]
            own_sinks = None if sinks is None else sinks.detach().to(dtype).requires_grad_()
            own_q, own_k, own_v = parts
            own_out = attend(own_q, own_k, own_v, plan, groups, sinks=own_sinks, window=window)
            own_inputs = parts if own_sinks is None else [*parts, own_sinks]
            results = [own_out.detach(), *torch.autograd.grad(own_out, own_inputs, grad[:, own].to(dtype))]
            for number, (result, wanted) in enumerate(zip(results, expected, strict=True)):
                if number == 4:
                    dist.all_reduce(result)
                error = (result.double() - (wanted if number == 4 else wanted[:, own])).abs().max()
                worst = max(worst, float(error))
    context.close()
    return worst


@pytest.mark.parametrize("name", ["direct", "ring", "double_ring", "all_gather"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_results_and_gradients_equal_those_of_one_process(
    num_ranks: int, name: MovementName, ranks: Callable[[int], RankPool]
) -> None:
    assert max(ranks(num_ranks).run(largest_error, num_ranks, name, torch.float64, list(DOCUMENTS)[:4])) < 1e-13


def test_three_ranks_in_fp32(ranks: Callable[[int], RankPool]) -> None:
    """36 tokens: neither ranks nor chunks divide a document. Sums of up to 20 products of numbers of size 1."""
    assert max(ranks(3).run(largest_error, 3, "direct", torch.float32, ["odd shares"])) < 1e-5


def rounded_once(num_ranks: int, name: MovementName) -> bool:
    """Whether the result in bf16, and the gradient of values, are within half a unit of those of one process."""
    context = ParallelContext.create(ParallelLayout(world_size=num_ranks, context=num_ranks))
    groups, rank = context_groups(context), context.index("context")
    lengths = (48,)
    cut = cut_tokens(lengths, num_ranks, "zigzag")
    plan = make_plan(TokenPieces.of(lengths, cut), movement_of(name, num_ranks), rank, None)
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, 48, heads, 8).bfloat16() for heads in (4, 2, 2, 4))
    whole_q, whole_k, whole_v = (x.double().requires_grad_() for x in (q, k, v))
    expected = whole_attention(whole_q, whole_k, whole_v, lengths, None, None)
    (expected_grad,) = torch.autograd.grad(expected, whole_v, grad.double())

    own = torch.from_numpy(cut.indices(rank))
    own_q, own_k, own_v = (x[:, own].requires_grad_() for x in (q, k, v))
    # The kernel for bf16 units of a CPU rounds inside of a tile; this is about what happens between tiles.
    with patch.object(partial_attention, "_is_native", lambda *_: False):
        out = attend(own_q, own_k, own_v, plan, groups)
        (grad_v,) = torch.autograd.grad(out, own_v, grad[:, own])
    context.close()
    pairs = [(out, expected[:, own]), (grad_v, expected_grad[:, own])]
    return all(bool(((a.double() - b).abs() <= b.abs() * 2**-8 + 1e-6).all()) for a, b in pairs)


@pytest.mark.parametrize("name", ["direct", "ring", "double_ring", "all_gather"])
def test_nothing_is_rounded_to_16_bits_on_the_way(name: MovementName, ranks: Callable[[int], RankPool]) -> None:
    """Partial results, and sums of gradients, are merged and sent in fp32: bf16 comes at the end, once."""
    assert all(ranks(4).run(rounded_once, 4, name))


# -- order and bytes --------------------------------------------------------------------------------------------------


def recorded(num_ranks: int, name: MovementName) -> tuple[list[str], list[str], int, AttentionPlan]:
    """What happens in forward and backward of one layer, in order, and the bytes that this rank sends."""
    context = ParallelContext.create(ParallelLayout(world_size=num_ranks, context=num_ranks))
    groups, rank = context_groups(context), context.index("context")
    lengths = (16 * num_ranks,)
    cut = cut_tokens(lengths, num_ranks, "zigzag")
    plan = make_plan(TokenPieces.of(lengths, cut), movement_of(name, num_ranks), rank, None)
    q = torch.randn(1, 16, 4, 8, requires_grad=True)
    k, v = (torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(2))
    events: list[str] = []
    sent = 0

    def kernel(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object, **kwargs: object) -> None:
            events.append("kernel")
            function(*args, **kwargs)

        return call

    start = dist.batch_isend_irecv

    def batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        nonlocal sent
        for operation in operations:
            if operation.op is dist.isend:
                events.append("keys" if operation.group is groups.keys else "gradients")
                sent += operation.tensor.nbytes
        return start(operations)

    with (
        patch.object(attention_executor, "add_partial_attention", kernel(attention_executor.add_partial_attention)),
        patch.object(
            attention_executor, "partial_attention_backward", kernel(attention_executor.partial_attention_backward)
        ),
        patch.object(dist, "batch_isend_irecv", batch),
    ):
        out = attend(q, k, v, plan, groups)
        forward = list(events)
        events.clear()
        out.sum().backward()
    context.close()
    return forward, events, sent, plan


def test_messages_start_before_the_kernels_that_hide_them(ranks: Callable[[int], RankPool]) -> None:
    for rank, (forward, backward, _, _) in enumerate(ranks(4).run(recorded, 4, "direct")):
        # Rank r needs the first chunks of all, and the second ones of the ranks above it; all need something.
        assert forward == ["keys", "kernel"] * 3 + ["kernel"]
        assert backward == ["keys", "kernel", *["keys", "kernel", "gradients"] * 2, "kernel", "gradients"], rank
    for forward, backward, _, _ in ranks(4).run(recorded, 4, "all_gather"):
        assert forward == ["keys"] * 3 + ["kernel"] * 4
        assert backward == ["keys"] * 3 + ["kernel"] * 4 + ["gradients"] * 3


@pytest.mark.parametrize("name", ["direct", "ring", "double_ring"])
def test_bytes_are_those_of_the_plan(name: MovementName, ranks: Callable[[int], RankPool]) -> None:
    """Keys and values in forward and backward in their dtype, and their gradients in fp32."""
    for _, _, sent, plan in ranks(4).run(recorded, 4, name):
        keys, gradients = (
            sum(num_rows(plan.rows_of(message)) for step in plan.steps for message in getattr(step, kind))
            for kind in ("key_sends", "gradient_sends")
        )
        assert sent == (2 * keys + gradients) * 2 * (8 + 8) * torch.float32.itemsize
