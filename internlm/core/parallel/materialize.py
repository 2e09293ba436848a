"""Initial values of parameters: the same in every layout, while a rank draws little more than it holds.

A parameter is drawn in fp32, block by block. The random numbers of a block depend only on the seed, the global name
of the parameter and the block number, so a rank draws only the blocks that intersect its boxes, one at a time.
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
"""Maximum number of elements in a block (16 MiB in fp32), unless one row has more. Initial weights depend on it."""


def blocks_of(shape: Index) -> Iterator[tuple[Index, Index]]:
    """(offset, size) of the blocks of a global tensor, in order.

    A block consists of consecutive rows. If a tensor of several matrices (such as one per expert) exceeds one block, no
    block spans two matrices.
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
    """This rank's initial values of a parameter, shape `spec.local_shape`; 0 outside the boxes (padding).

    Args:
        spec: what the rank holds.
        initializer: draws the values in fp32.
        seed: of the run.
        dtype: of the result; the values are rounded to it.
        device: of the result, and of the random numbers.
    """
    local = torch.zeros(spec.local_shape, dtype=dtype, device=device)
    shape = spec.global_shape
    draws_whole = getattr(initializer, "draws_whole", False)
    blocks = [((0,) * len(shape), shape)] if draws_whole else list(blocks_of(shape))
    for number, (offset, size) in enumerate(blocks):
        parts = [part for box in spec.boxes if (part := box.intersect_global(offset, size)) is not None]
        if parts:
            key = spec.name if len(blocks) == 1 else f"{spec.name}/{number}"
            block = torch.empty(size, dtype=torch.float32, device=device)
            initializer.fill(block, torch.Generator(device=device).manual_seed(_seed_of(seed, key)))
            for part in parts:
                local[part.local_slices()].copy_(block[_within(part, offset)])
            # Freed before the next block is allocated.
            del block
    return local


def local_parameter(parameter: nn.Parameter, spec: ShardSpec, seed: int, device: torch.device) -> nn.Parameter:
    """The local parameter of this rank, on the meta device until it is materialized on `device`.

    Args:
        parameter: the global parameter, on the meta device; carries its initializer.
        spec: what the rank holds of it.
        seed: of the run.
        device: see `draw`.
    """
    local = torch.empty(spec.local_shape, dtype=parameter.dtype, device="meta")
    result = nn.Parameter(local, requires_grad=parameter.requires_grad)
    attach_shard_spec(result, spec)
    setattr(result, _DRAW, partial(draw, spec, initializer_of(parameter), seed, parameter.dtype, device))
    return result


def materialized(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter with storage and initial values, to replace one from `local_parameter`."""
    draw_local: Callable[[], Tensor] = getattr(parameter, _DRAW)
    result = nn.Parameter(draw_local(), requires_grad=parameter.requires_grad)
    attach_shard_spec(result, shard_spec_of(parameter))
    return result


def materialize(module: nn.Module, only: Collection[nn.Parameter] | None = None) -> None:
    """Replace the parameters from `local_parameter` in a module and its children by materialized ones.

    A parameter that is used in two places stays shared if both are in `module`.

    Args:
        only: the parameters to replace; None for all.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta and (only is None or parameter in only):
                if parameter not in made:
                    made[parameter] = materialized(parameter)
                setattr(owner, name, made[parameter])


def _within(part: Box, offset: Index) -> tuple[slice, ...]:
    """Index of a part of a block in the block that begins at `offset`."""
    return tuple(
        slice(start - origin, start - origin + extent)
        for start, origin, extent in zip(part.global_offset, offset, part.size, strict=True)
    )


def _seed_of(seed: int, key: str) -> int:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
