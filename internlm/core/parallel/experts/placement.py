"""Which part of the weights of all experts of a layer a rank holds: pure arithmetic."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import Box, ShardSpec
from internlm.core.parallel.weight_splits import ParameterShard, Range, even_part, padded_rows
from internlm.utils.errors import ConfigError
from internlm.utils.layout_checks import check_expert_tensor

_WIDTH = {"w13": (1, 2), "w2": (2, 1)}
"""Attribute -> the dimension that is the width of an expert, and how many matrices follow one another along it."""


def place_experts(context: ParallelContext, name: str, attribute: str, shape: tuple[int, ...]) -> list[ParameterShard]:
    """This rank's part of a weight of all experts of a layer, `[E, ...]`.

    The expert axis deals whole experts; it folds over data and tensor ranks alike, so the ranks with the same experts
    are those of `expert_data`. The ranks of the inner axis of the expert view split each of them: over its width as
    tensor ranks split a feed-forward network, or (isp) over rows, which are gathered for use. Experts that are only
    split over tensor ranks are placed in the weight view, like other weights that these split, so that FSDP shards
    them too.

    Raises:
        ConfigError: the experts, or the width of an expert, cannot be split evenly.
    """
    layout, spec = context.layout, ShardSpec.whole(name, shape)
    check_expert_tensor(layout.expert_tensor, layout.tensor)
    size, index = context.size("expert", "expert"), context.index("expert", "expert")
    if shape[0] % size:
        raise ConfigError(f"the {shape[0]} experts of '{name}' cannot be dealt evenly to {size} expert ranks")
    own = shape[0] // size
    experts = (index * own, own)
    # Biases are small: only those of w1 and w3 are split, and only over tensor ranks.
    is_whole = len(shape) == 2 and (layout.expert_weight > 1 or not attribute.startswith("w13"))
    if is_whole:
        spec = _part_of_experts(replace(spec, sharded_over=("expert",)), experts, 1, [(0, shape[1])])
        if layout.expert_weight > 1:
            spec = replace(spec, partial_over=("expert_weight",))
        elif layout.expert_tensor > 1 and layout.expert == 1:
            return [ParameterShard(attribute, replace(ShardSpec.whole(name, shape), partial_over=("tensor",)))]
        elif layout.expert_tensor > 1:
            spec = replace(spec, partial_over=("expert_tensor",))
    elif layout.expert_weight > 1:
        spec = replace(spec, sharded_over=("expert", "expert_weight"))
        spec = _rows_of_experts(spec, experts, layout.expert_weight, context.index("expert_weight", "expert"))
    elif layout.expert_tensor > 1:
        axes = ("tensor",) if layout.expert == 1 else ("expert", "expert_tensor")
        dim, num_matrices = _WIDTH[attribute.removesuffix("_bias")]
        width = shape[dim] // num_matrices
        part = even_part(width, layout.expert_tensor, context.index("tensor"), "the width of an expert")
        ranges = [(number * width + part[0], part[1]) for number in range(num_matrices)]
        spec = _part_of_experts(replace(spec, sharded_over=axes), experts, dim, ranges)
    else:
        spec = _part_of_experts(replace(spec, sharded_over=("expert",)), experts, 1, [(0, shape[1])])
    if "tensor" not in spec.sharded_over:
        spec = replace(spec, view="expert", data_axis="expert_data")
    return [ParameterShard(attribute, spec)]


def _part_of_experts(spec: ShardSpec, experts: Range, dim: int, ranges: list[Range]) -> ShardSpec:
    """Consecutive experts, and of each of them some ranges along `dim`, one after the other."""
    first, own = experts
    shape, sizes = spec.global_shape, [number for _, number in ranges]
    boxes = []
    for (start, number), filled in zip(ranges, accumulate([0, *sizes]), strict=False):
        rest = [0] * (len(shape) - 1)
        origin, local, size = [first, *rest], [0, *rest], [own, *shape[1:]]
        origin[dim], local[dim], size[dim] = start, filled, number
        boxes.append(Box(tuple(origin), tuple(local), tuple(size)))
    local_shape = [own, *shape[1:]]
    local_shape[dim] = sum(sizes)
    return replace(spec, local_shape=tuple(local_shape), boxes=tuple(boxes))


def _rows_of_experts(spec: ShardSpec, experts: Range, n: int, t: int) -> ShardSpec:
    """The t-th of n equal blocks of the rows of consecutive experts, whose matrices are stacked.

    So parts of any number of ranks are gathered without a copy. The local tensor is whole experts where the block is,
    else one matrix with the rows of all experts that the block touches.
    """
    (first, own), (_, rows, width) = experts, spec.global_shape
    (start, number), block = padded_rows(own * rows, n, t)
    if block % rows == 0:
        held = number // rows
        boxes = [Box((first + start // rows, 0, 0), (0, 0, 0), (held, rows, width))] if held else []
        return replace(spec, local_shape=(block // rows, rows, width), boxes=tuple(boxes))
    boxes, stop = [], start + number
    for expert in range(start // rows, -(-stop // rows) if number else 0):
        low, high = max(start, expert * rows), min(stop, (expert + 1) * rows)
        boxes.append(Box((first + expert, low - expert * rows, 0), (0, low - start, 0), (1, high - low, width)))
    return replace(spec, local_shape=(1, block, width), boxes=tuple(boxes))
