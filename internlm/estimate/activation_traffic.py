"""Bytes of activations and their gradients that a rank sends for one micro-batch.

By a layer over the tensor axis and over the context axis, by embedding and head, and between pipeline stages.
"""

from __future__ import annotations

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.context.attention_plan import num_rows
from internlm.core.parallel.context.key_gathering import KeyGathering
from internlm.estimate.collective_bytes import all_gather_bytes, all_reduce_bytes
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.parameters import RankParameters
from internlm.estimate.training_step import TrainingStep, context_plans, gathering_of
from internlm.model.recompute import SavePolicy

_FLOAT32, _INT64 = 4, 8


def layer_activations_sent(
    held: RankParameters,
    step: TrainingStep,
    policy: SavePolicy,
    *,
    has_experts: bool = False,
    predicts_later_token: bool = False,
    gathering: KeyGathering | None = None,
) -> float:
    """Bytes that a layer sends over the tensor axis for one micro-batch, including those of recomputation.

    Args:
        held: parameters of the rank.
        step: see `TrainingStep`.
        policy: of the layer.
        has_experts: whether the layer has experts.
        predicts_later_token: whether a norm follows, so that recomputation repeats the whole layer.
        gathering: of latent vectors over context ranks.
    """
    layout, m = held.context.layout, step.dimensions
    t, size = layout.tensor, m.dtype.itemsize
    is_recomputed = policy != "everything"
    residual = step.tokens * m.hidden_size * size
    # Inputs of the column layers of attention, and the rotary key that heads share.
    attention, key = float(residual), 0.0
    # Latent vectors that are gathered over tensor ranks first, then over context ranks: not by the column layer.
    latents = 0.0
    if m.latent is not None:
        direct = m.hidden_size if m.latent.q_rank is None else m.latent.q_rank
        attention = step.tokens * (direct + m.latent.kv_rank) * size
        key = step.tokens * m.latent.rotary_dim * size
        latents = 0.0 if gathering is None else step.tokens * m.latent.kv_rank * size
    if layout.is_isp:
        heads = (m.num_heads + max(m.num_kv_heads, t)) * (m.head_dim + m.value_dim)
        one_way = all_gather_bytes(step.tokens / t * heads * size, t)
        return one_way * (3 if is_recomputed else 2)
    shared_width = m.experts.shared_width if has_experts and m.experts is not None else 0
    # A dense feed-forward network or shared experts, and parts of experts for the tokens of all ranks.
    num_dense, num_parts = int(not has_experts or shared_width > 0), int(has_experts and layout.expert_tensor > 1)
    # Recomputation repeats the reductions after wo; after w2, if a gate is multiplied with its result; and after
    # experts, if shared ones follow.
    is_gated = shared_width > 0 and m.experts is not None and m.experts.shared_mix != "sum"
    repeated = 1 + int(is_gated) + (num_parts if shared_width else 0)
    if predicts_later_token:
        repeated = 1 + num_dense + num_parts
    repeated = repeated if is_recomputed else 0
    choices = _choices_sent(step, t, is_recomputed) if num_parts else 0.0
    if layout.mode == "mtp":
        # In forward the outputs of wo and w2, in backward the input gradients.
        if m.latent is not None and gathering is not None:
            # The gradient of the gathered ones.
            attention += gathering.num_keys * m.latent.kv_rank * size - latents
        sent = all_reduce_bytes(residual * (1 + 2 * (num_dense + num_parts) + repeated) + attention + key, t)
        if has_experts and layout.splits_tokens_of_routers and not num_parts:
            # The gradients of all parts are summed, and their results gathered, again if shared experts follow.
            num_gathers = 2 if is_recomputed and (shared_width or predicts_later_token) else 1
            sent += all_reduce_bytes(residual, t) + num_gathers * all_gather_bytes(residual, t)
        return sent + choices
    # Gathers and reduce-scatters, in forward and backward.
    exchanged = residual * (2 + 4 * (num_dense + num_parts) + repeated) + 2 * attention + 2 * key
    exchanged += key + latents + residual * num_parts if is_recomputed else 0
    inputs = residual * num_dense + attention - latents
    return all_gather_bytes(exchanged + _input_gathers(layout, policy) * inputs, t) + choices


def joining_sent(held: RankParameters, step: TrainingStep, policy: SavePolicy) -> float:
    """Bytes that a layer that predicts a later token sends over the tensor axis to join hidden states and embeddings.

    For one micro-batch, beside those of `layer_activations_sent`: its projection `[h, 2h]` is a column layer whose
    output goes to the residual stream.

    Args:
        held: parameters of the rank.
        step: see `TrainingStep`.
        policy: of the layer.
    """
    layout, m = held.context.layout, step.dimensions
    if layout.is_isp:
        return 0.0
    t, is_recomputed = layout.tensor, policy != "everything"
    output = step.tokens * m.hidden_size * m.dtype.itemsize
    joined = 2 * output
    if layout.mode == "mtp":
        return all_reduce_bytes(joined, t) + (2 if is_recomputed else 1) * all_gather_bytes(output, t)
    gathers = _input_gathers(layout, policy)
    # An all-to-all of this rank's channels in each direction; a gather and a reduce-scatter of the input.
    return all_gather_bytes((3 if is_recomputed else 2) * output / t + (2 + gathers) * joined, t)


def _input_gathers(layout: ParallelLayout, policy: SavePolicy) -> int:
    """How often backward gathers the input of a column layer that msp or fsp split over the sequence."""
    if layout.mode == "msp":
        return 0 if policy == "everything" else 1
    return 2 if policy in ("attention", "nothing") else 1


def keys_sent(context: ParallelContext, step: TrainingStep, layer: int) -> float:
    """Bytes of keys and values and their gradients that a layer sends to other context ranks for one micro-batch."""
    layout, m = context.layout, step.dimensions
    if layout.context == 1:
        return 0.0
    gathering = gathering_of(context, step, layer)
    if gathering is not None:
        return latents_sent(gathering, m, step.policies[layer])
    plan = context_plans(context, step).plans[m.window(layer)]
    keys, gradients = (
        sum(num_rows(plan.rows_of(message)) for each in plan.steps for message in getattr(each, kind))
        for kind in ("key_sends", "gradient_sends")
    )
    width = max(m.num_kv_heads, layout.tensor) // layout.tensor * (m.head_dim + m.value_dim)
    size = m.dtype.itemsize
    # Keys travel in forward and backward, whatever is recomputed; gradients in fp32 (float64 for float64).
    return width * (2 * keys * size + gradients * max(_FLOAT32, size))


def latents_sent(gathering: KeyGathering, dimensions: ModelDimensions, policy: SavePolicy) -> float:
    """Bytes of latent vectors and their gradients that a layer sends to other context ranks for one micro-batch."""
    assert dimensions.latent is not None
    sent = sum(num_rows(rows) for rows in gathering.sends.values())
    returned = sum(sum(gathering.sizes_of(source)) for source in gathering.sources)
    width = dimensions.latent.kv_rank + dimensions.latent.rotary_dim
    return width * dimensions.dtype.itemsize * ((1 if policy == "everything" else 2) * sent + returned)


def ends_sent(held: RankParameters, step: TrainingStep) -> float:
    """Bytes that embedding, head and loss send over the tensor axis for one micro-batch.

    For each layer that predicts a later token, too.
    """
    layout, m = held.context.layout, step.dimensions
    if layout.is_isp:
        return 0.0
    t, sent = layout.tensor, 0.0
    residual = step.tokens * m.hidden_size * m.dtype.itemsize
    num_later = m.num_multi_token if held.has_head else 0
    if num_embedded := held.has_embedding + num_later:
        by_hidden = step.options.split_embedding_hidden and not m.has_tied_head and m.hidden_size % t == 0
        if layout.mode == "mtp":
            sent += num_embedded * (all_gather_bytes(residual, t) if by_hidden else all_reduce_bytes(residual, t))
        else:
            # An all-to-all of a shard of the channels in each direction, or a reduce-scatter and a gather.
            sent += num_embedded * 2 * all_gather_bytes(residual / t if by_hidden else residual, t)
    if held.has_head:
        # mtp: an all-reduce of the gradient; msp and fsp: a gather of hidden states, a reduce-scatter of the gradient.
        sent += (1 + num_later) * all_reduce_bytes(residual, t)
        # Largest score, its class, and three sums per token.
        scores = max(_FLOAT32, m.dtype.itemsize)
        sent += (1 + num_later) * all_reduce_bytes(step.tokens * (4 * scores + _INT64), t)
    return sent


def stage_message_bytes(held: RankParameters, step: TrainingStep) -> float:
    """Bytes of the residual stream of one micro-batch between two stages."""
    layout, m = held.context.layout, step.dimensions
    tokens = step.tokens if layout.mode == "mtp" else step.tokens / layout.tensor
    return tokens * m.hidden_size * m.residual_dtype.itemsize


def _choices_sent(step: TrainingStep, ranks: int, is_recomputed: bool) -> float:
    """Bytes of the experts of each token and their weights, which the ranks that split experts gather."""
    experts = step.dimensions.experts
    assert experts is not None
    weights = max(_FLOAT32, step.dimensions.dtype.itemsize)
    # Weights are gathered, again in recomputation, and their gradients reduced.
    per_choice = _INT64 + weights * (3 if is_recomputed else 2)
    return all_gather_bytes(step.tokens * experts.form.top_k * per_choice, ranks)
