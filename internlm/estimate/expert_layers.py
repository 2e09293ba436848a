"""Tokens, activations and bytes sent of the layers with experts.

With balanced experts, a rank computes as many rows as it has (token, expert) pairs. T tokens are routed by a rank, k
experts are chosen by each, of E experts of width f; h is the hidden size and n the number of ranks that share the
experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from internlm.core.context.layout import ParallelLayout
from internlm.estimate.dimensions import ModelDimensions
from internlm.model.recompute import SavePolicy

_FLOAT32, _INT64 = 4, 8


@dataclass(frozen=True)
class RoutedTokens:
    """What a rank routes and computes in an expert layer for one micro-batch.

    Attributes:
        tokens: tokens that this rank routes.
        dispatched: tokens that it sends to experts: those it routes, or those of all tensor ranks, T.
        rows: rows that its experts compute, `k T`, if all experts get equally many.
        most_rows: rows if all tokens of the n ranks choose experts of this rank, `n T min(k, E / n)`.
    """

    tokens: float
    dispatched: float
    rows: float
    most_rows: float

    @classmethod
    def of(cls, dimensions: ModelDimensions, layout: ParallelLayout, tokens: int) -> RoutedTokens:
        """Of a micro-batch of `tokens` tokens on the tensor ranks of one context rank."""
        form = dimensions.experts.form  # type: ignore[union-attr]
        is_split = layout.mode != "mtp" or layout.splits_tokens_of_routers
        own = tokens / (layout.tensor if is_split else 1)
        dispatched = own * layout.expert_tensor
        held = form.num_experts // layout.expert
        most = layout.expert * dispatched * min(form.top_k, held)
        return cls(own, dispatched, form.top_k * dispatched, most)


def exchanged_rows_sent(dimensions: ModelDimensions, rows: float, ranks: int, policy: SavePolicy) -> float:
    """Bytes that a rank sends to the experts of other ranks in one layer, for a micro-batch, with balanced experts.

    Rows go there and back in the forward and in the backward pass, each time `k T h b (n-1)/n` bytes; recomputation
    sends them twice more.

    Args:
        dimensions: of the model.
        rows: (token, expert) pairs of the rank.
        ranks: number of ranks that share the experts, n.
        policy: save policy of the layer.
    """
    num_exchanges = 4 if policy == "everything" else 6
    return num_exchanges * rows * dimensions.hidden_size * dimensions.dtype.itemsize * (ranks - 1) / ranks


def gathered_experts_sent(dimensions: ModelDimensions, ranks: int, policy: SavePolicy, gradient_size: int) -> float:
    """Bytes that a rank sends instead if it gathers the weights of all experts, which `ranks` ranks share.

    Two gathers, and a third one for recomputation, and the reduce-scatter of the gradients:
    `3 E h f (2 b + g) (n-1)/n` bytes.

    Args:
        dimensions: of the model.
        ranks: number of ranks, n.
        policy: save policy of the layer.
        gradient_size: bytes of an element of a gradient in the reduce-scatter, g.
    """
    experts = dimensions.experts
    assert experts is not None
    numel = 3 * experts.form.num_experts * dimensions.hidden_size * experts.width
    gathers = 3 if policy in ("attention", "nothing") else 2
    return numel * (gathers * dimensions.dtype.itemsize + gradient_size) * (ranks - 1) / ranks


def expert_bytes(
    dimensions: ModelDimensions,
    layout: ParallelLayout,
    routed: RoutedTokens,
    residual_tokens: float,
    policy: SavePolicy,
    *,
    is_worst: bool = False,
) -> float:
    """Bytes that the router and the routed experts of a layer save for backward; without the shared experts.

    Args:
        dimensions: of the model.
        layout: of all ranks.
        routed: tokens and rows of this rank.
        residual_tokens: tokens of its residual stream.
        policy: save policy of the layer.
        is_worst: count `RoutedTokens.most_rows`, otherwise the rows of balanced experts.
    """
    experts = dimensions.experts
    assert experts is not None
    h, f, size = dimensions.hidden_size, experts.width / layout.expert_tensor, dimensions.dtype.itemsize
    k, num_experts, wide = experts.form.top_k, experts.form.num_experts, max(_FLOAT32, size)
    rows = routed.most_rows if is_worst else routed.rows
    # Every policy saves the chosen experts. Recomputation also needs the numbers of tokens of experts, those from other
    # ranks too; otherwise the experts of this rank keep theirs.
    choice = routed.tokens * k * _INT64
    is_shared = layout.expert_tensor > 1
    counts: float = num_experts * (1 if layout.expert == 1 else 2) * _INT64
    # And, on the host, the numbers of rows that are sent to ranks and received from them.
    counts += 2 * layout.expert * _INT64 if layout.expert > 1 else 0
    # And, where tensor ranks share experts, the choices of all.
    counts += routed.dispatched * k * _INT64 if is_shared else 0
    if policy in ("nothing", "attention"):
        return choice + counts
    logits = routed.tokens * num_experts * wide
    gate = {"sum": 0, "sigmoid": 1, "softmax": 2}[experts.shared_mix] if experts.shared_width else 0
    if policy == "matmuls":
        # Outputs of the GEMMs.
        return choice + counts + logits + rows * (2 * f + h) * size + residual_tokens * gate * size
    # Logits and scores; log-sum-exp, weights before and after the division, and their sum; numbers of tokens of
    # experts, and their shares.
    router = 2 * logits + routed.tokens * (1 + 2 * k + 1) * wide
    router += num_experts * (_INT64 / layout.expert + wide)
    # The input: a copy in fp32, or else the output of the norm, which shared experts save too unless they gather it.
    if size < wide:
        router += routed.tokens * h * wide
    elif not experts.shared_width or layout.mode == "msp":
        router += residual_tokens * h * size
    # Instead of their own weights, these ranks save those of all.
    router += (routed.dispatched - routed.tokens) * k * wide if is_shared else 0
    # Rows go to experts and back in an order and its inverse; those of other ranks have another one.
    orders = 2 * k * routed.dispatched * _INT64 + (2 * rows * _INT64 if layout.expert > 1 else 0)
    # Inputs of both GEMMs, gate and up; outputs, which the gradient of the weights needs.
    computed = rows * (h + 3 * f) * size + k * routed.dispatched * h * size
    # The factors of the outputs, and the outputs that they multiply.
    mixed = {0: 0, 1: 1 + h, 2: 2 + 2 * h}[gate] * size
    return choice + router + orders + computed + residual_tokens * mixed
