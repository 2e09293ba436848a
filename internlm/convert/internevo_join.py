"""Joins the shards of a weight in an InternEvo checkpoint, whose shapes show how it was split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from internlm.convert.internevo_files import RankShard
from internlm.utils.errors import CheckpointError

Agreed = Callable[[str, Sequence[RankShard]], Tensor]
"""(name, replicas) -> the tensor of replicas, which must be equal."""


class RankShards(Protocol):
    """Shards of tensors that are named and split like the weights in the files."""

    def shards(self, name: str) -> list[RankShard]:
        """The shards of a tensor, in rank order."""

    def agreed(self, name: str, replicas: Sequence[RankShard]) -> Tensor:
        """The tensor of replicas, which must be equal."""


def join(name: str, shape: tuple[int, ...], shards: Sequence[RankShard], split: str, agreed: Agreed) -> Tensor:
    """Join shards to the tensor of this shape.

    Raises:
        CheckpointError: the shards do not fit the shape, or replicas differ.
    """
    tensors = [shard.tensor for shard in shards]
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise CheckpointError(f"'{name}' has different dtypes in {', '.join(shard.file for shard in shards)}")
    if all(tuple(tensor.shape) == shape for tensor in tensors):
        return agreed(name, shards)
    for dim in range(len(shape)):
        others = [tensor.shape[:dim] + tensor.shape[dim + 1 :] for tensor in tensors]
        if any(tuple(other) != shape[:dim] + shape[dim + 1 :] for other in others):
            continue
        size = sum(tensor.shape[dim] for tensor in tensors)
        if size == shape[dim]:
            return torch.cat(tensors, dim)
        # Some versions of InternEvo split the head of isp over the sequence-parallel ranks, which may be fewer.
        if name == "output.weight" and split == "wp" and dim == 0 and size % shape[0] == 0:
            distinct = len(tensors) * shape[0] // size
            return torch.cat([agreed(name, shards[rank::distinct]) for rank in range(distinct)])
    raise CheckpointError(misfit(name, shape, shards))


def misfit(name: str, shape: tuple[int, ...], shards: Sequence[RankShard]) -> str:
    """A message for shards that do not fit the shape of a weight."""
    shapes = ", ".join(f"{shard.file} {list(shard.tensor.shape)}" for shard in shards[:4])
    rest = f" and {len(shards) - 4} more" if len(shards) > 4 else ""
    more = ""
    rows = sum(shard.tensor.shape[0] for shard in shards if shard.tensor.dim() == len(shape))
    if shards[0].file.startswith("model_wp") and name == "output.weight" and 0 < rows < shape[0]:
        more = (
            "; InternEvo's isp with a tensor.size above its weight.size saves only some ranks' shards of the head: the "
            "others are not in this checkpoint"
        )
    size = math.prod(shape)
    return f"'{name}' must have shape {list(shape)} ({size:,} elements) in total; the files have {shapes}{rest}{more}"
