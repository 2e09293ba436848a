"""Collectives over Python objects, for rare events outside of the training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from internlm.core.context.parallel_context import ParallelContext

T = TypeVar("T")


def from_main_rank(context: ParallelContext, action: Callable[[], T]) -> T:
    """Run `action` on the main rank and return its result on every rank; collective.

    `action` must not raise: the other ranks would wait forever.
    """
    values: list[Any] = [action() if context.is_main_rank else None]
    if context.world_group is not None:
        dist.broadcast_object_list(values, src=0)
    value: T = values[0]
    return value


def of_all_ranks(context: ParallelContext, value: T) -> list[T]:
    """The values of all ranks, in rank order; collective."""
    if context.world_group is None:
        return [value]
    values: list[Any] = [None] * context.world_size
    dist.all_gather_object(values, value)
    return values
