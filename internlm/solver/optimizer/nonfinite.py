"""Finds the weights, gradients and optimizer states that contain an inf or NaN, by name, layer and rank.

For the start and the failure of a run: everything here waits for the device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from internlm.core.communication.objects import of_all_ranks
from internlm.core.optimizer_protocol import Optimizer
from internlm.core.parallel.fsdp import local_tensor, reshard
from internlm.core.parallel.shard_spec import shard_spec_of

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True, order=True)
class NonFinite:
    """A tensor with an inf or NaN; sorts in forward order.

    Attributes:
        layer: number of its layer; -1 before the layers, infinity after them.
        name: global name.
        rank: the first rank whose part of it is not finite.
    """

    layer: float
    name: str
    rank: int

    def __str__(self) -> str:
        where = f"layer {self.layer:.0f}, " if 0 <= self.layer < math.inf else ""
        return f"'{self.name}' ({where}on rank {self.rank})"


def nonfinite_weights(optimizer: Optimizer) -> list[NonFinite]:
    """Non-finite weights of the whole model, in forward order; collective."""
    return _of_all_ranks(optimizer, _weights(optimizer))


def nonfinite_gradients(optimizer: Optimizer) -> list[NonFinite]:
    """Non-finite gradients of the last step, in forward order; collective. Valid until the next step begins."""
    return _of_all_ranks(
        optimizer,
        ((name, piece) for name, _, pieces in optimizer.sharded_gradients() for _, piece in pieces),
    )


def nonfinite_states(optimizer: Optimizer) -> list[NonFinite]:
    """Non-finite fp32 masters and state tensors (`master/<name>`, `exp_avg/<name>` ...); collective."""
    return _of_all_ranks(
        optimizer, ((key, piece) for key, _, pieces in optimizer.sharded_state() for _, piece in pieces)
    )


def describe_failed_update(optimizer: Optimizer) -> str:
    """Describe in one line which tensors are not finite after a skipped update; collective."""
    weights = nonfinite_weights(optimizer)
    if weights:
        return f"not finite: {len(weights)} weight(s), the first one is {weights[0]}"
    gradients = nonfinite_gradients(optimizer)
    if not gradients:
        return "all weights are finite, and so are the gradients of the last step"
    # Backward runs from the last layer to the first, and everything computed from an inf or NaN is not finite either.
    return (
        f"all weights are finite, the gradients of {len(gradients)} are not, and the first one that backward reaches "
        f"is that of {gradients[-1]}"
    )


def _weights(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    optimizer.finish_gathering()
    for chunk in optimizer.chunks:
        reshard(chunk)
        for parameter in chunk.parameters():
            spec = shard_spec_of(parameter)
            for box in spec.boxes:
                yield spec.name, local_tensor(parameter)[box.local_slices()]


@torch.no_grad()
def _of_all_ranks(optimizer: Optimizer, tensors: Iterable[tuple[str, Tensor]]) -> list[NonFinite]:
    context = optimizer.context
    names = [shard_spec_of(parameter).name for chunk in optimizer.chunks for parameter in chunk.parameters()]
    first_layer = next((place for place, name in enumerate(names) if _LAYER.search(name)), 0)
    leading = set(names[:first_layer])
    found: set[NonFinite] = set()
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            number = _LAYER.search(name)
            layer = float(number[1]) if number else -1.0 if name.split("/")[-1] in leading else math.inf
            found.add(NonFinite(layer, name, context.rank))
    merged: dict[str, NonFinite] = {}
    for each in sorted(each for on_rank in of_all_ranks(context, found) for each in on_rank):
        merged.setdefault(each.name, each)
    return list(merged.values())
