"""Rows of all context ranks that a rank needs, gathered straight from their owners, in one step.

In backward, gradients return to the owners, which add them up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.parallel.context.attention_plan import num_rows
from internlm.core.parallel.context.block_traffic import ContextGroups, add_rows, take_rows
from internlm.core.parallel.context.key_gathering import KeyGathering
from internlm.model.recompute import as_recomputed_operator


def gather_rows(x: Tensor, gathering: KeyGathering, groups: ContextGroups) -> Tensor:
    """The rows that this rank needs of all context ranks. Collective over them.

    Recomputation gathers again: saved, the rows would be as many on each rank as one process has.

    Args:
        x: `[1, S, ...]`, a row for each token that this rank owns.
        gathering: of this rank.
        groups: of the context ranks.

    Returns:
        `[1, gathering.num_keys, ...]`, in the order of the sample, with zeros as padding. The gradient is sent in the
        dtype of x, and summed in fp32 (float64 for float64).
    """
    assert x.shape[:2] == (1, gathering.num_tokens), f"the gathering is for {gathering.num_tokens} tokens"
    result: Tensor = _GatherKeys.apply(x, gathering, groups)
    return result


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gathering: KeyGathering, groups: ContextGroups) -> Tensor:
        ctx.gathering, ctx.groups = gathering, groups
        (gathered,) = as_recomputed_operator(lambda: [_gathered(x[0], gathering, groups.keys).unsqueeze(0)], x)
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _returned(grad[0], ctx.gathering, ctx.groups.gradients).unsqueeze(0), None, None


def _gathered(own: Tensor, gathering: KeyGathering, group: dist.ProcessGroup) -> Tensor:
    """`[S, ...]` -> `[num_keys, ...]`."""
    sizes = {source: gathering.sizes_of(source) for source in (gathering.rank, *gathering.sources)}
    blocks = {source: own.new_empty(sum(sizes[source]), *own.shape[1:]) for source in gathering.sources}
    sends = {other: take_rows(own, rows) for other, rows in gathering.sends.items()}
    _exchange(sends, blocks, group)
    blocks[gathering.rank] = own
    parts = {source: iter(block.split(sizes[source])) for source, block in blocks.items()}
    padding = own.new_zeros(gathering.num_keys - gathering.num_rows, *own.shape[1:])
    return torch.cat([*(next(parts[source]) for source, _ in gathering.segments), padding])


def _returned(grad: Tensor, gathering: KeyGathering, group: dist.ProcessGroup) -> Tensor:
    """The gradient of `_gathered`: `[num_keys, ...]` -> `[S, ...]`."""
    parts: dict[int, list[Tensor]] = {source: [] for source in (gathering.rank, *gathering.sources)}
    segments = grad[: gathering.num_rows].split([rows for _, rows in gathering.segments])
    for (source, _), segment in zip(gathering.segments, segments, strict=True):
        parts[source].append(segment)
    sends = {source: torch.cat(parts[source]) for source in gathering.sources}
    returned = {other: grad.new_empty(num_rows(rows), *grad.shape[1:]) for other, rows in gathering.sends.items()}
    _exchange(sends, returned, group)
    total = torch.cat(parts[gathering.rank]).to(torch.promote_types(grad.dtype, torch.float32))
    for other, block in returned.items():
        add_rows(total, gathering.sends[other], block)
    return total.to(grad.dtype)


def _exchange(sends: dict[int, Tensor], receives: dict[int, Tensor], group: dist.ProcessGroup) -> None:
    """Send and receive a tensor for each rank of a group; returns when all have arrived."""
    operations = [dist.P2POp(dist.isend, block, group=group, group_peer=peer) for peer, block in sends.items()]
    operations += [dist.P2POp(dist.irecv, block, group=group, group_peer=peer) for peer, block in receives.items()]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
