"""Which parameters share a bucket, in which order buckets are reduced, and who waits for which one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.layers import layers_of
from internlm.core.parallel.parallelize import roles_by_module
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.model.roles import Role
from internlm.solver.optimizer.bucket import Bucket
from internlm.solver.optimizer.bucket_groups import BucketKind
from internlm.solver.optimizer.flat_bucket import FlatBucket
from internlm.solver.optimizer.fsdp_bucket import FsdpBucket
from internlm.solver.optimizer.parameter_groups import ParameterGroup, options_of
from internlm.solver.optimizer.state_form import StateForm


def build_buckets(
    parameters: Sequence[nn.Parameter],
    context: ParallelContext,
    *,
    groups: Sequence[ParameterGroup] = (),
    weight_decay: float,
    decay_all: bool,
    bucket_size: int,
    reduce_dtype: torch.dtype,
    form: StateForm,
) -> list[Bucket]:
    """Buckets in the order in which backward completes them.

    Args:
        parameters: in forward order.
        context: where this rank stands.
        groups: parameter groups by name; see `ParameterGroup`.
        weight_decay: of parameters whose group does not say.
        decay_all: that applies to one-dimensional parameters too.
        bucket_size: elements a bucket holds at most, unless it is one parameter.
        reduce_dtype: dtype in which gradients are communicated.
        form: how gradients and masters are kept.
    """
    open_buckets: dict[BucketKind, list[nn.Parameter]] = {}
    runs: list[tuple[BucketKind, list[nn.Parameter]]] = []
    # Backward reaches the last parameters first; buckets in that order are complete one after the other.
    for parameter in reversed(parameters):
        kind = BucketKind.of(parameter, options_of(parameter, groups, weight_decay, decay_all=decay_all))
        run = open_buckets.get(kind)
        if run is None or sum(map(_local_numel, (*run, parameter))) > bucket_size:
            run = open_buckets[kind] = []
            runs.append((kind, run))
        run.append(parameter)
    # A bucket is complete in backward, and needed in forward, at its first parameter in forward order.
    position = {parameter: number for number, parameter in enumerate(parameters)}
    runs.sort(key=lambda item: min(position[parameter] for parameter in item[1]), reverse=True)
    return [
        (FsdpBucket if kind.is_sharded_over_zero else FlatBucket)(run, kind, kind.groups(context), reduce_dtype, form)
        for kind, run in runs
    ]


def wait_before_forward(chunk: nn.Module, buckets: Sequence[Bucket]) -> None:
    """Let the layers of `chunk` wait for their own weights when they are called, and the chunk for all others.

    Except for the head: it is read, not called, so whoever reads it waits (`parameter_events.wait_until_readable`).
    """
    layers = layers_of(chunk)
    outer = set(chunk.parameters())
    for layer in layers:
        parameters = set(layer.parameters())
        outer -= parameters
        _wait_for(layer, parameters, buckets)
    if layers:
        head = {name for name, role in roles_by_module(chunk).items() if role is Role.HEAD}
        outer -= {p for name, module in chunk.named_modules() if name in head for p in module.parameters()}
    _wait_for(chunk, outer, buckets)


def _wait_for(module: nn.Module, parameters: set[nn.Parameter], buckets: Iterable[Bucket]) -> None:
    needed = [bucket for bucket in buckets if bucket.needs_gathering and not parameters.isdisjoint(bucket.parameters)]
    if needed:
        module.register_forward_pre_hook(partial(_finish_gathering, needed))


def _finish_gathering(buckets: list[Bucket], module: nn.Module, args: object) -> None:
    for bucket in buckets:
        bucket.finish_gathering()


def _local_numel(parameter: nn.Parameter) -> int:
    return math.prod(shard_spec_of(parameter).local_shape)
