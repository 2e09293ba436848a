"""First values of parameters: the same in every layout, though a rank draws little more than it holds.

A parameter is drawn in fp32, block by block. The random numbers of a block depend only on the seed, the global name
of the parameter and the number of the block, so a rank draws the blocks that meet its boxes, one at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from internlm.core.parallel.shard_spec import Box, Index, ShardSpec, attach_shard_spec, shard_spec_of
from internlm.model.initialization import Initializer, initializer_of

_DRAW = "internlm_draw"

BLOCK = 2**22
"""Most elements of a block (16 MiB in fp32), unless a single row has more. It decides the initial weights."""


def blocks_of(shape: Index) -> Iterator[tuple[Index, Index]]:
    """(offset, size) of the blocks of a global tensor, in order.

    A block is a run of rows, and lies within one matrix where a tensor of several (as of experts) is more than a block.
    """
    if math.prod(shape) <= BLOCK:
        yield (0,) * len(shape), shape
        return
    first, *rest = shape
    if len(shape) > 2:
        for index in range(first):
            for offset, size in blocks_of(tuple(rest)):
                yield (index, *offset), (1, *size)
        return
    step = max(1, BLOCK // math.prod(rest))
    for start in range(0, first, step):
        yield (start, *(0 for _ in rest)), (min(step, first - start), *rest)


def draw(spec: ShardSpec, initializer: Initializer, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """This rank's initial values of a parameter, of `spec.local_shape`; 0 where no box lies (padding).

    Args:
        spec: what the rank holds.
        initializer: draws the values in fp32, which are then rounded to `dtype`.
        seed: of the run.
    """
    local = torch.zeros(spec.local_shape, dtype=dtype, device=device)
    blocks = list(blocks_of(spec.global_shape))
    for number, (offset, size) in enumerate(blocks):
        parts = [part for box in spec.boxes if (part := box.intersect_global(offset, size)) is not None]
        if parts:
            key = spec.name if len(blocks) == 1 else f"{spec.name}/{number}"
            block = torch.empty(size, dtype=torch.float32, device=device)
            initializer.fill(block, torch.Generator(device=device).manual_seed(_seed_of(seed, key)))
            for part in parts:
                local[part.local_slices()].copy_(block[_within(part, offset)])
            # Before the next one is made.
            del block
    return local


def local_parameter(parameter: nn.Parameter, spec: ShardSpec, seed: int, device: torch.device) -> nn.Parameter:
    """The local parameter of this rank, on the meta device until it is materialized on `device`.

    Args:
        parameter: the global one, on the meta device; carries its initializer.
        spec: what the rank holds of it.
        seed: of the run.
    """
    local = torch.empty(spec.local_shape, dtype=parameter.dtype, device="meta")
    result = nn.Parameter(local, requires_grad=parameter.requires_grad)
    attach_shard_spec(result, spec)
    setattr(result, _DRAW, partial(draw, spec, initializer_of(parameter), seed, parameter.dtype, device))
    return result


def materialized(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter with storage and initial values, in place of one from `local_parameter`."""
    draw_local: Callable[[], Tensor] = getattr(parameter, _DRAW)
    result = nn.Parameter(draw_local(), requires_grad=parameter.requires_grad)
    attach_shard_spec(result, shard_spec_of(parameter))
    return result


def materialize(module: nn.Module, only: Collection[nn.Parameter] | None = None) -> None:
    """Exchange the parameters from `local_parameter` in a module and its children for materialized ones.

    Args:
        only: these; None for all. A parameter in two places stays one if both are in `module`.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta and (only is None or parameter in only):
                if parameter not in made:
                    made[parameter] = materialized(parameter)
                setattr(owner, name, made[parameter])


def _within(part: Box, offset: Index) -> tuple[slice, ...]:
    """Where a part of a block is in the block that begins at `offset`."""
    return tuple(
        slice(start - origin, start - origin + extent)
        for start, origin, extent in zip(part.global_offset, offset, part.size, strict=True)
    )


def _seed_of(seed: int, key: str) -> int:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
