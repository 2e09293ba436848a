"""Collectives over flat tensors. A group of None is one rank, for which there is nothing to do."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.communication.pending import Pending

# torch 2.12 renamed the two single-tensor collectives and warns on the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(
    tensor: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduce `tensor` in place over the group, and return it."""
    if group is not None:
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def all_reduce_async(tensor: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """Start summing `tensor` in place over the group."""
    return Pending(tensor, None if group is None else dist.all_reduce(tensor, group=group, async_op=True))


def reduce_scatter_async(output: Tensor, tensor: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start summing flat `tensor` (numel a multiple of the group size); `output` gets this rank's equal slice."""
    return Pending(output, _reduce_scatter(output, tensor, group=group, async_op=True))


def all_gather_async(output: Tensor, tensor: Tensor, group: dist.ProcessGroup) -> Pending:
    """Start gathering every rank's flat `tensor` into `output`, in group order."""
    return Pending(output, _all_gather(output, tensor, group=group, async_op=True))


def all_to_all(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send part r of contiguous `tensor`, `[n, ...]`, to rank r; part r of the result is from rank r."""
    output = torch.empty_like(tensor)
    dist.all_to_all_single(output, tensor, group=group)
    return output
