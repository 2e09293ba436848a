"""Bytes that a rank sends in one optimizer step, by axis.

Of n bytes, an all-gather or a reduce-scatter over k ranks sends `n (k-1)/k`, an all-reduce twice that; an all-to-all of
n bytes on each rank sends `n (k-1)/k`. Not counted: padding of flat buffers, the numbers of tokens of experts, and
scalars (token counts, metrics, the gradient norm, scales of float8, run control). tests/estimate/test_bytes_sent.py
compares these functions with the calls of torch.distributed in a training step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import torch

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.context.attention_plan import num_rows
from internlm.core.parallel.context.key_gathering import KeyGathering
from internlm.core.parallel.context.split_batch import ContextPlans, ContextSplit
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.core.scheduler.actions import Action
from internlm.core.scheduler.communication import message_from
from internlm.core.scheduler.stage_placement import Placement
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.expert_layers import RoutedTokens, exchanged_rows_sent
from internlm.estimate.parameters import HeldParameter, RankParameters
from internlm.model.recompute import SavePolicy
from internlm.solver.optimizer.state_form import StateForm

_FLOAT32, _INT64 = 4, 8


@dataclass(frozen=True)
class BytesSent:
    """Bytes that one rank sends in one step.

    Attributes:
        tensor: activations and their gradients, gradients of replicated weights, and the loss, over the tensor ranks.
        context: keys and values, and their gradients, if each row is one document.
        weight: weights and gradients over the weight ranks of isp, and the expert weight ranks.
        data: gradients and weights over the ranks that hold the same weights: hybrid ZeRO and FSDP.
        pipeline: activations and gradients between stages, and gradients of a tied embedding between the ends.
        expert: tokens for the experts of other ranks, and their results, if all experts get equally many.
    """

    tensor: float = 0.0
    context: float = 0.0
    weight: float = 0.0
    data: float = 0.0
    pipeline: float = 0.0
    expert: float = 0.0

    @property
    def all_bytes(self) -> float:
        """The sum over all axes."""
        return sum(astuple(self))


@dataclass(frozen=True)
class TrainingStep:
    """The parts of a config that determine the bytes sent in a step.

    Attributes:
        dimensions: dimensions of the model.
        tokens: tokens of a micro-batch on the tensor ranks of one context rank.
        lengths: of the documents of a micro-batch.
        num_micro_batches: micro-batches of a step.
        policies: save policy of each layer of the rank, by layer number.
        options: options of `parallelize`; `reduce_dtype` is the dtype of gradients in collectives.
        form: dtypes of gradients and optimizer states.
    """

    dimensions: ModelDimensions
    tokens: int
    lengths: tuple[int, ...]
    num_micro_batches: int
    policies: Mapping[int, SavePolicy]
    options: ParallelOptions
    form: StateForm


def all_gather_bytes(num_bytes: float, ranks: int) -> float:
    """Bytes sent by an all-gather, a reduce-scatter or an all-to-all.

    Args:
        num_bytes: bytes of the full tensor; for an all-to-all, bytes of each rank's input.
        ranks: number of ranks in the group.
    """
    return num_bytes * (ranks - 1) / ranks


def all_reduce_bytes(num_bytes: float, ranks: int) -> float:
    """Bytes sent by an all-reduce of `num_bytes` over `ranks`: a reduce-scatter and an all-gather."""
    return 2 * all_gather_bytes(num_bytes, ranks)


def bytes_sent(held: RankParameters, step: TrainingStep, actions: Sequence[Action], placement: Placement) -> BytesSent:
    """Bytes that a rank sends in one step.

    Args:
        held: parameters of the rank.
        step: see `TrainingStep`.
        actions: the rank's actions in a step, in order.
        placement: which pipeline rank computes which stage.
    """
    context, m = held.context, step.num_micro_batches
    layers = [layer for chunk in held.layers for layer in chunk]
    has_experts = step.dimensions.has_experts
    tensor = sum(
        layer_activations_sent(
            *(held, step, step.policies[layer]),
            has_experts=has_experts(layer),
            gathering=gathering_of(context, step, layer),
        )
        for layer in layers
    )
    expert = 0.0
    for layer in filter(has_experts, layers):
        rows = RoutedTokens.of(step.dimensions, context.layout, step.tokens).rows
        expert += exchanged_rows_sent(step.dimensions, rows, context.layout.expert, step.policies[layer])
    tensor += ends_sent(held, step)
    context_sent = sum(keys_sent(held.context, step, layer) for layer in layers)
    weight = sum(weight_gathering_sent(parameter, held, step) for parameter in held.parameters)
    data = sum(fsdp_sent(parameter, held, step) for parameter in held.parameters)
    synchronized = {"tensor": 0.0, "weight": 0.0, "data": 0.0, "pipeline": 0.0}
    for parameter in held.parameters:
        for axis, sent in synchronization_sent(parameter, held, step).items():
            synchronized[axis] += sent
    rank = context.index("pipeline")
    num_messages = sum(message_from(placement, rank, action) is not None for action in actions)
    return BytesSent(
        tensor=m * tensor + synchronized["tensor"],
        context=m * context_sent,
        weight=m * weight + synchronized["weight"],
        data=m * data + synchronized["data"],
        pipeline=num_messages * stage_message_bytes(held, step) + synchronized["pipeline"],
        expert=m * expert,
    )


def layer_activations_sent(
    held: RankParameters,
    step: TrainingStep,
    policy: SavePolicy,
    *,
    has_experts: bool = False,
    gathering: KeyGathering | None = None,
) -> float:
    """Bytes that a layer sends over the tensor axis for one micro-batch, including those of recomputation.

    Args:
        held: parameters of the rank.
        step: see `TrainingStep`.
        policy: of the layer.
        has_experts: whether the layer has experts.
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
    repeated = 1 + int(is_gated) + (num_parts if shared_width else 0) if is_recomputed else 0
    choices = _choices_sent(step, t, is_recomputed) if num_parts else 0.0
    if layout.mode == "mtp":
        # In forward the outputs of wo and w2, in backward the input gradients.
        if m.latent is not None and gathering is not None:
            # The gradient of the gathered ones.
            attention += gathering.num_keys * m.latent.kv_rank * size - latents
        sent = all_reduce_bytes(residual * (1 + 2 * (num_dense + num_parts) + repeated) + attention + key, t)
        if has_experts and layout.splits_tokens_of_routers and not num_parts:
            # The gradients of all parts are summed, and their results gathered, again if shared experts follow.
            num_gathers = 2 if is_recomputed and shared_width else 1
            sent += all_reduce_bytes(residual, t) + num_gathers * all_gather_bytes(residual, t)
        return sent + choices
    # Gathers and reduce-scatters, in forward and backward.
    exchanged = residual * (2 + 4 * (num_dense + num_parts) + repeated) + 2 * attention + 2 * key
    exchanged += key + latents + residual * num_parts if is_recomputed else 0
    inputs = residual * num_dense + attention - latents
    gathers = 2 if policy in ("attention", "nothing") else 1
    if layout.mode == "msp":
        gathers = 1 if is_recomputed else 0
    return all_gather_bytes(exchanged + gathers * inputs, t) + choices


def keys_sent(context: ParallelContext, step: TrainingStep, layer: int) -> float:
    """Bytes of keys and values and their gradients that a layer sends to other context ranks for one micro-batch."""
    layout, m = context.layout, step.dimensions
    if layout.context == 1:
        return 0.0
    gathering = gathering_of(context, step, layer)
    if gathering is not None:
        return latents_sent(gathering, m, step.policies[layer])
    plan = context_plans(context, step).plans[m.window(min(layer, m.num_layers - 1))]
    keys, gradients = (
        sum(num_rows(plan.rows_of(message)) for each in plan.steps for message in getattr(each, kind))
        for kind in ("key_sends", "gradient_sends")
    )
    width = max(m.num_kv_heads, layout.tensor) // layout.tensor * (m.head_dim + m.value_dim)
    size = m.dtype.itemsize
    # Keys travel in forward and backward, whatever is recomputed; gradients in fp32 (float64 for float64).
    return width * (2 * keys * size + gradients * max(_FLOAT32, size))


def gathering_of(context: ParallelContext, step: TrainingStep, layer: int) -> KeyGathering | None:
    """The gathering of latent vectors over context ranks in a layer; None if there is none."""
    m = step.dimensions
    if m.latent is None or not context.layout.gathers_latents:
        return None
    return context_plans(context, step).gatherings[m.window(min(layer, m.num_layers - 1))]


def latents_sent(gathering: KeyGathering, dimensions: ModelDimensions, policy: SavePolicy) -> float:
    """Bytes of latent vectors and their gradients that a layer sends to other context ranks for one micro-batch."""
    assert dimensions.latent is not None
    sent = sum(num_rows(rows) for rows in gathering.sends.values())
    returned = sum(sum(gathering.sizes_of(source)) for source in gathering.sources)
    width = dimensions.latent.kv_rank + dimensions.latent.rotary_dim
    return width * dimensions.dtype.itemsize * ((1 if policy == "everything" else 2) * sent + returned)


def context_plans(context: ParallelContext, step: TrainingStep) -> ContextPlans:
    """Cut and plans of attention of a rank, for a micro-batch of `step`."""
    layout = context.layout
    windows = Counter(step.dimensions.window(layer) for layer in range(step.dimensions.num_layers))
    split = ContextSplit(
        *(context.index("context"), layout.context, layout.tensor, windows, step.options.context),
        gathers_keys=step.dimensions.latent is not None and layout.gathers_latents,
    )
    return split.plan(step.lengths)


def _choices_sent(step: TrainingStep, ranks: int, is_recomputed: bool) -> float:
    """Bytes of the experts of each token and their weights, which the ranks that split experts gather."""
    experts = step.dimensions.experts
    assert experts is not None
    weights = max(_FLOAT32, step.dimensions.dtype.itemsize)
    # Weights are gathered, again in recomputation, and their gradients reduced.
    per_choice = _INT64 + weights * (3 if is_recomputed else 2)
    return all_gather_bytes(step.tokens * experts.form.top_k * per_choice, ranks)


def ends_sent(held: RankParameters, step: TrainingStep) -> float:
    """Bytes that embedding, head and loss send over the tensor axis for one micro-batch."""
    layout, m = held.context.layout, step.dimensions
    if layout.is_isp:
        return 0.0
    t, sent = layout.tensor, 0.0
    residual = step.tokens * m.hidden_size * m.dtype.itemsize
    if held.has_embedding:
        by_hidden = step.options.split_embedding_hidden and not m.has_tied_head and m.hidden_size % t == 0
        if layout.mode == "mtp":
            sent += all_gather_bytes(residual, t) if by_hidden else all_reduce_bytes(residual, t)
        else:
            # An all-to-all of a shard of the channels in each direction, or a reduce-scatter and a gather.
            sent += 2 * all_gather_bytes(residual / t if by_hidden else residual, t)
    if held.has_head:
        # mtp: an all-reduce of the gradient; msp and fsp: a gather of hidden states, a reduce-scatter of the gradient.
        sent += all_reduce_bytes(residual, t)
        # Largest score, its class, and three sums per token.
        scores = max(_FLOAT32, m.dtype.itemsize)
        sent += all_reduce_bytes(step.tokens * (4 * scores + _INT64), t)
    return sent


def weight_gathering_sent(parameter: HeldParameter, held: RankParameters, step: TrainingStep) -> float:
    """Bytes that isp sends over the weight (or expert weight) axis for a parameter and one micro-batch."""
    axis = "expert_weight" if parameter.spec.view == "expert" else "weight"
    if axis not in parameter.spec.sharded_over:
        return 0.0
    w = held.context.size(axis, parameter.spec.view)
    numel = w * math.prod(parameter.spec.local_shape)
    gradient = step.options.reduce_dtype.itemsize if parameter.is_trained else 0
    if parameter.layer is None:
        # Embedding and head are gathered once; the loss computes its gradients in the forward pass.
        uses = 2 if step.dimensions.has_tied_head and held.has_embedding and held.has_head else 1
        return uses * all_gather_bytes(numel * (parameter.dtype.itemsize + gradient), w)
    gathers = 3 if step.policies[parameter.layer] in ("attention", "nothing") else 2
    return all_gather_bytes(numel * (gathers * _gathered_itemsize(parameter, step) + gradient), w)


def fsdp_sent(parameter: HeldParameter, held: RankParameters, step: TrainingStep) -> float:
    """Bytes that FSDP sends over the zero axis for a parameter and one micro-batch."""
    if not parameter.is_fsdp:
        return 0.0
    z = held.context.size("zero", "weight")
    rows, *other = parameter.full.local_shape
    numel = -(-rows // z) * z * math.prod(other)
    gathers = 1 if parameter.layer is None else 2
    gradient = step.options.reduce_dtype.itemsize if parameter.is_trained else 0
    return all_gather_bytes(numel * (gathers * _gathered_itemsize(parameter, step) + gradient), z)


def synchronization_sent(parameter: HeldParameter, held: RankParameters, step: TrainingStep) -> dict[str, float]:
    """Bytes by axis that the optimizer sends for a parameter in one step: gradient reductions and weight gathers."""
    if not parameter.is_trained:
        return {}
    spec, view = parameter.spec, held.context.view(parameter.spec.view)
    numel = math.prod(spec.local_shape)
    gradients = step.form.gradient_dtype(parameter.dtype)
    size = (step.options.reduce_dtype if gradients == torch.float32 else gradients).itemsize
    has_zero = spec.data_axis in view.merged
    replicas = view.size(f"{spec.data_axis}_replica" if has_zero else spec.data_axis)
    z = view.size("zero") if has_zero and not parameter.is_fsdp else 1
    shard = numel / z
    sent = {
        "data": all_gather_bytes(numel * (size + parameter.dtype.itemsize), z)
        + all_reduce_bytes(shard * size, replicas)
    }
    for name in spec.partial_over:
        axis = {"kv_replica": "tensor", "pipeline_ends": "pipeline"}.get(name, name)
        sent[axis] = sent.get(axis, 0.0) + all_reduce_bytes(shard * size, view.size(name))
    return sent


def stage_message_bytes(held: RankParameters, step: TrainingStep) -> float:
    """Bytes of the residual stream of one micro-batch between two stages."""
    layout, m = held.context.layout, step.dimensions
    tokens = step.tokens if layout.mode == "mtp" else step.tokens / layout.tensor
    return tokens * m.hidden_size * m.residual_dtype.itemsize


def _gathered_itemsize(parameter: HeldParameter, step: TrainingStep) -> int:
    """Bytes per element of a gathered weight: 1 if it is gathered in float8."""
    options = step.options
    is_float8 = options.gather_float8 and parameter.layer in options.float8_layers
    return 1 if is_float8 and len(parameter.spec.local_shape) == 2 else parameter.dtype.itemsize
