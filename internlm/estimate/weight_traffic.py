"""Bytes of weights and their gradients that a rank sends, parameter by parameter."""

from __future__ import annotations

import math

import torch

from internlm.estimate.collective_bytes import all_gather_bytes, all_reduce_bytes
from internlm.estimate.parameters import HeldParameter, RankParameters
from internlm.estimate.training_step import TrainingStep


def weight_gathering_sent(parameter: HeldParameter, held: RankParameters, step: TrainingStep) -> float:
    """Bytes that isp sends over the weight (or expert weight) axis for a parameter and one micro-batch."""
    axis = "expert_weight" if parameter.spec.view == "expert" else "weight"
    if axis not in parameter.spec.sharded_over:
        return 0.0
    w = held.context.size(axis, parameter.spec.view)
    numel = w * math.prod(parameter.spec.local_shape)
    gradient = step.options.reduce_dtype.itemsize if parameter.is_trained else 0
    if parameter.layer is None:
        # Gathered for each use; the loss computes its gradients in the forward pass.
        return _uses_of_end(parameter, held, step) * all_gather_bytes(numel * (parameter.dtype.itemsize + gradient), w)
    gathers = 3 if step.policies[parameter.layer] in ("attention", "nothing") else 2
    return all_gather_bytes(numel * (gathers * _gathered_itemsize(parameter, step) + gradient), w)


def _uses_of_end(parameter: HeldParameter, held: RankParameters, step: TrainingStep) -> int:
    """How often a micro-batch uses the embedding or the output head on this rank; all losses use the head at once."""
    if not parameter.is_embedding:
        return 1
    for_later_tokens = held.has_head and step.dimensions.num_multi_token > 0
    return held.has_embedding + for_later_tokens + (held.has_head and step.dimensions.has_tied_head)


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


def _gathered_itemsize(parameter: HeldParameter, step: TrainingStep) -> int:
    """Bytes per element of a gathered weight: 1 if it is gathered in float8."""
    options = step.options
    is_float8 = options.gather_float8 and parameter.layer in options.float8_layers
    return 1 if is_float8 and len(parameter.spec.local_shape) == 2 else parameter.dtype.itemsize
