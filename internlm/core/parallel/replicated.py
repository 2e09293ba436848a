"""The trivial mode: every rank holds every weight whole; only samples differ between ranks (data parallelism)."""

from __future__ import annotations

from torch import nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import ShardSpec
from internlm.model.roles import Role


def shard(name: str, parameter: nn.Parameter, role: Role, context: ParallelContext) -> ShardSpec:
    """The ShardSpec of one parameter; every role is held whole."""
    return ShardSpec.whole(name, parameter.shape)
