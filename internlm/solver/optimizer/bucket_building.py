"""Assigns parameters to buckets in the order of backward, and makes modules wait for their weights."""

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
        parameters: parameters in forward order.
        context: where this rank stands.
        groups: parameter groups by name; see `ParameterGroup`.
        weight_decay: default for parameters whose group does not set it.
        decay_all: whether the default applies to one-dimensional parameters (norms, biases) too.
        bucket_size: maximum number of elements in a bucket; a larger parameter gets a bucket of its own.
        reduce_dtype: dtype in which gradients are communicated.
        form: dtypes and device of gradients and optimizer state.
    """
    open_buckets: dict[BucketKind, list[nn.Parameter]] = {}
    runs: list[tuple[BucketKind, list[nn.Parameter]]] = []
    # Backward reaches the last parameters first, so buckets are completed in this order.
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
    """Make each layer of `chunk` wait for its weights when it is called, and the chunk for all others.

    The head is excluded: it is read, not called, so its readers wait (`parameter_events.wait_until_readable`).
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
