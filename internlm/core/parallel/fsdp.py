"""Fully sharded data parallelism (ZeRO stage 3): weights are split over the ranks that shard the optimizer state.

torch's `fully_shard` gathers the weights of a layer before its forward and its backward pass, frees them afterwards,
and reduce-scatters its gradients after the backward pass of every micro-batch, so that no rank ever holds the gradients
of the whole model. A rank stores rows of each weight, as described by its ShardSpec.

Source: PyTorch FSDP, Zhao et al. 2023 (arXiv:2304.11277); the per-parameter form is torch's FSDP2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp_float8 import gather_in_float8
from internlm.core.parallel.layers import layers_of
from internlm.core.parallel.linear.weight_scales import WeightScales
from internlm.core.parallel.materialize import materialize
from internlm.core.parallel.shard_spec import ShardSpec, attach_shard_spec, shard_spec_of
from internlm.model.moe.router import routers_of
from internlm.utils.layout_checks import check_fsdp


def apply_fsdp(
    model: nn.Module,
    context: ParallelContext,
    *,
    reduce_dtype: torch.dtype = torch.float32,
    float8_scales: WeightScales | None = None,
) -> nn.Module:
    """Shard every weight by rows over the `zero` ranks, layer by layer. Changes and returns `model`.

    If `zero` is smaller than the data axis (`parallel.zero1.size`), its replicas hold equal shards; the optimizer sums
    gradients over them once per step. Gradients are sums, not means. Weights outside of layers stay gathered from
    the forward to the end of the backward pass, because the head is read in between.

    Scalars, weights of another dtype than most of their layer (fp32 norms among bf16 matrices), and selection biases of
    routers, which no optimizer updates, are not sharded. In each backward pass, all ranks must use the same weights.

    Args:
        model: after `parallelize`, before the optimizer is built. With `ParallelOptions.defer_weights`, a rank never
            has more than one unsharded layer in memory.
        context: this rank's position and process groups.
        reduce_dtype: dtype in which gradients are communicated and summed.
        float8_scales: gather the weights of float8 GEMMs as float8, with these scales; None: in their own dtype.

    Raises:
        LayoutError: the layout has pipeline stages, or its weights are already sharded (isp).
    """
    layout = context.layout
    check_fsdp(True, layout.pipeline, layout.mode)
    group = context.group("zero", "weight")
    if group is None:
        materialize(model)
        return model
    specs = {name: shard_spec_of(parameter) for name, parameter in model.named_parameters()}
    layers = layers_of(model)
    materialize(model, unsharded_parameters(model) | _dealt_experts(model))
    unsharded = unsharded_parameters(model) | _dealt_experts(model)

    mesh = DeviceMesh.from_group(group, context.device.type)
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for layer in layers:
        materialize(layer)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy, ignored_params=unsharded)
    materialize(model)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy, ignored_params=unsharded)
    for module in _fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        # Otherwise torch divides by the factor of 1 with a reduction that only NCCL implements.
        module.set_force_sum_reduction_for_comms(True)
    if float8_scales is not None:
        gather_in_float8(model, float8_scales, context.group("tensor"))
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            spec = rows_of(specs[name], context.size("zero", "weight"), context.index("zero", "weight"))
            assert parameter.to_local().shape == spec.local_shape
            attach_shard_spec(parameter, spec)
    return model


def _dealt_experts(model: nn.Module) -> set[nn.Parameter]:
    """Experts that are dealt to ranks: they differ among the ranks that FSDP would shard them over."""
    return {parameter for parameter in model.parameters() if shard_spec_of(parameter).view == "expert"}


def unsharded_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that FSDP does not shard.

    They cannot share a flat buffer with the rest of their layer, or they are selection biases.
    """
    layers = layers_of(model)
    inner = {parameter for layer in layers for parameter in layer.parameters()}
    unsharded = {p for layer in layers for p in _not_flattenable(layer.parameters())}
    unsharded.update(router.selection_bias for router in routers_of([model]) if router.selection_bias is not None)
    return unsharded | _not_flattenable(p for p in model.parameters() if p not in inner)


def rows_of(spec: ShardSpec, size: int, index: int) -> ShardSpec:
    """The spec of rank `index` of `size` when the local tensor of `spec` is split by rows, as by torch's Shard(0).

    The first ranks get `ceil(rows / size)` rows each; the last ones may get fewer, or none.
    """
    rows, *other = spec.local_shape
    step = -(-rows // size)
    start = min(index * step, rows)
    shape = (min(step, rows - start), *other)
    parts = [box.intersect_local((start,) + (0,) * len(other), shape) for box in spec.boxes]
    boxes = tuple(
        replace(part, local_offset=(part.local_offset[0] - start, *part.local_offset[1:]))
        for part in parts
        if part is not None
    )
    return replace(spec, local_shape=shape, boxes=boxes, sharded_over=(*spec.sharded_over, "zero"))


def reshard(model: nn.Module) -> None:
    """Free gathered weights and their scales: `model.parameters()` are this rank's shards again, and may be changed.

    Must not be called between a forward pass and its backward pass.
    """
    parallel = getattr(model, "parallel", None)
    if parallel is not None:
        parallel.weight_scales.forget()
    for module in _fsdp_modules(model):
        module.reshard()


@torch.no_grad()
def local_tensor(tensor: Tensor) -> Tensor:
    """The local tensor of a parameter or gradient, shape `ShardSpec.local_shape`; detached, with shared storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _not_flattenable(parameters: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    """Scalars, and all parameters whose dtype is not the one with the most elements."""
    parameters = list(parameters)
    elements: Counter[torch.dtype] = Counter()
    for parameter in parameters:
        elements[parameter.dtype] += math.prod(parameter.shape)
    return {p for p in parameters if p.ndim == 0 or p.dtype != elements.most_common(1)[0][0]}
