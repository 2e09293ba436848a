"""Bytes that a rank sends in one optimizer step, by axis.

Not counted: padding of flat buffers, the numbers of tokens of experts, and scalars (token counts, metrics, the gradient
norm, scales of float8, run control). tests/estimate/test_bytes_sent.py compares these numbers with the calls of
torch.distributed in a training step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from internlm.core.scheduler.actions import Action
from internlm.core.scheduler.communication import message_from
from internlm.core.scheduler.stage_placement import Placement
from internlm.estimate.activation_traffic import (
    ends_sent,
    joining_sent,
    keys_sent,
    layer_activations_sent,
    stage_message_bytes,
)
from internlm.estimate.expert_layers import RoutedTokens, exchanged_rows_sent
from internlm.estimate.parameters import RankParameters
from internlm.estimate.training_step import TrainingStep, gathering_of
from internlm.estimate.weight_traffic import fsdp_sent, synchronization_sent, weight_gathering_sent


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
            predicts_later_token=step.dimensions.predicts_later_token(layer),
            gathering=gathering_of(context, step, layer),
        )
        for layer in layers
    )
    expert = 0.0
    for layer in filter(has_experts, layers):
        rows = RoutedTokens.of(step.dimensions, context.layout, step.tokens).rows
        expert += exchanged_rows_sent(step.dimensions, rows, context.layout.expert, step.policies[layer])
    later = filter(step.dimensions.predicts_later_token, layers)
    tensor += ends_sent(held, step) + sum(joining_sent(held, step, step.policies[layer]) for layer in later)
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
