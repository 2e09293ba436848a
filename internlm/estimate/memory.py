"""Bytes of weights, gradients, optimizer states and activations on a rank, by moment of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.scheduler.actions import Action, ActionKind
from internlm.estimate.activations import LayerActivations
from internlm.estimate.parameters import HeldParameter, RankParameters
from internlm.model.recompute import SavePolicy
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm, master_dtype


@dataclass(frozen=True)
class RankMemory:
    """Weights, gradients and optimizer states of a rank, in bytes, which are allocated from the start of a run on.

    Without activations, and without the padding of flat buffers.

    Attributes:
        parameters: number of elements, not bytes.
        weights: weights in the dtype of the model.
        gradients: gradients accumulated over micro-batches, and this rank's shard of their sum over the data ranks.
        masters: fp32 masters of the optimizer; fp32 parameters are their own, except with FSDP.
        moments: both moments of AdamW.
        host: masters and moments that are offloaded to host memory; these are not counted above.
    """

    parameters: int = 0
    weights: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    host: int = 0

    @classmethod
    def of(cls, parameter: HeldParameter, context: ParallelContext, form: StateForm = FP32_STATE) -> RankMemory:
        """The memory of one parameter."""
        spec, dtype = parameter.spec, parameter.dtype
        numel = math.prod(spec.local_shape)
        if not parameter.is_trained:
            return cls(parameters=numel, weights=numel * dtype.itemsize)
        zero = context.size("zero", spec.view)
        # With FSDP the parameter itself is this rank's shard.
        shard = numel if parameter.is_fsdp else -(-numel // zero)
        masters = master_dtype(dtype).itemsize * shard if parameter.is_fsdp or form.has_master(dtype) else 0
        moments = 2 * form.moment_dtype(dtype).itemsize * shard
        has_own_shard = not parameter.is_fsdp and zero > 1
        return cls(
            parameters=numel,
            weights=numel * dtype.itemsize,
            gradients=form.gradient_dtype(dtype).itemsize * (numel + shard if has_own_shard else numel),
            masters=0 if form.is_offloaded else masters,
            moments=0 if form.is_offloaded else moments,
            host=masters + moments if form.is_offloaded else 0,
        )

    @classmethod
    def of_rank(cls, held: RankParameters, form: StateForm = FP32_STATE) -> RankMemory:
        """The memory of all parameters of a rank."""
        return cls.sum(cls.of(parameter, held.context, form) for parameter in held.parameters)

    @classmethod
    def sum(cls, memories: Iterable[RankMemory]) -> RankMemory:
        """The sum of all attributes."""
        return cls(*(sum(column) for column in zip(*map(astuple, memories), strict=True)))

    @property
    def all_bytes(self) -> int:
        """Bytes on the device: weights, gradients, masters and moments."""
        return self.weights + self.gradients + self.masters + self.moments


def peak_activations(
    actions: Sequence[Action],
    chunk_layers: Sequence[Sequence[int]],
    activations: LayerActivations,
    policies: Mapping[int, SavePolicy],
) -> float:
    """Peak bytes of the activations that the layers of a rank save, over a step.

    Temporary memory of operators, the loss and tensors in flight between stages are not counted.

    Args:
        actions: the rank's actions in a step, in order.
        chunk_layers: layers of each of its chunks.
        activations: of any of these layers.
        policies: save policy of each of these layers, by layer number.
    """
    chunks = [sum(activations.of(layer).saved_bytes(policies[layer]) for layer in layers) for layers in chunk_layers]
    live = peak = 0.0
    for action in actions:
        if action.kind is ActionKind.FORWARD:
            live += chunks[action.chunk]
            peak = max(peak, live)
        elif action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT):
            live -= chunks[action.chunk]
    return peak
