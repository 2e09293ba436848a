"""The shard of a weight that each rank of the tensor or weight axis holds: pure arithmetic from roles to ShardSpecs.

n is the number of ranks of the axis and t the index of this rank; a weight is `[out, in]`, a bias `[out]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.shard_spec import Box, Index, ShardSpec
from internlm.model.roles import HeadShape, Role
from internlm.utils.errors import ConfigError
from internlm.utils.layout_checks import LayoutError, check_heads, check_width

Range = tuple[int, int]
"""(first, number) of consecutive rows or columns."""


class ParameterShard(NamedTuple):
    """A local parameter: the attribute of the parallel module that holds it, and its spec."""

    attribute: str
    spec: ShardSpec


def ranges_spec(spec: ShardSpec, dim: int, ranges: Sequence[Range], local_size: int | None = None) -> ShardSpec:
    """`spec`, a whole parameter, cut down to some ranges along `dim`, one after the other.

    Args:
        local_size: extent of the local tensor along `dim` where it is more than the ranges fill (padding).
    """
    shape = spec.global_shape
    boxes, filled = [], 0
    for first, number in ranges:
        if number > 0:
            boxes.append(
                Box(
                    _with((0,) * len(shape), dim, first),
                    _with((0,) * len(shape), dim, filled),
                    _with(shape, dim, number),
                )
            )
            filled += number
    local_shape = _with(shape, dim, filled if local_size is None else local_size)
    return replace(spec, local_shape=local_shape, boxes=tuple(boxes))


def _with(shape: Index, dim: int, size: int) -> Index:
    return tuple(size if d == dim else extent for d, extent in enumerate(shape))


def padded_rows(num_rows: int, n: int, t: int) -> tuple[Range, int]:
    """Rows of rank t when rows are dealt in equal blocks, the last ones padded: (its range, rows of a block)."""
    block = -(-num_rows // n)
    return (t * block, max(0, min(block, num_rows - t * block))), block


def even_part(size: int, n: int, t: int, what: str) -> Range:
    """The t-th of n equal ranges of `size`.

    Raises:
        ConfigError: they are not equal.
    """
    try:
        check_width(size, n)
    except LayoutError as error:
        raise ConfigError(error.named({"width": what})) from None
    return t * (size // n), size // n


def kv_replicas(heads: HeadShape, n: int) -> int:
    """Ranks that share a key-value head when heads are dealt to n ranks.

    Raises:
        LayoutError: heads cannot be dealt evenly.
    """
    check_heads(heads.num_heads, heads.num_kv_heads, n)
    return max(1, n // heads.num_kv_heads)


def tensor_parts(
    context: ParallelContext, whole: ShardSpec, attribute: str, role: Role, heads: HeadShape | None
) -> list[ParameterShard]:
    """The parts of a linear layer's weight or bias under Megatron's tensor parallelism.

    Args:
        whole: the spec of the whole parameter.
        attribute: "weight" or "bias".
        role: a role of linear layers.
        heads: for attention roles.

    Returns:
        One part, or two where a fused query-key-value weight has its key-value rows replicated: attributes
        `<attribute>` (queries) and `kv_<attribute>`.
    """
    n, t = context.size("tensor"), context.index("tensor")
    split = replace(whole, sharded_over=("tensor",))
    if role in (Role.ROW, Role.ATTENTION_OUT):
        if attribute == "bias":
            return [ParameterShard(attribute, whole)]
        what = "the width of the feed-forward" if role is Role.ROW else "the width of the attention"
        return [ParameterShard(attribute, ranges_spec(split, 1, [even_part(whole.global_shape[1], n, t, what)]))]
    rows = whole.global_shape[0]
    if role in (Role.COLUMN, Role.COLUMN_TO_RESIDUAL):
        what = "the width of the feed-forward" if role is Role.COLUMN else "the width of the residual stream"
        return [ParameterShard(attribute, ranges_spec(split, 0, [even_part(rows, n, t, what)]))]
    if role is Role.COLUMN_PAIR:
        first, number = even_part(rows // 2, n, t, "the width of the feed-forward")
        return [ParameterShard(attribute, ranges_spec(split, 0, [(first, number), (rows // 2 + first, number)]))]
    assert heads is not None, f"a model with the role {role} must say its heads"
    replicas = kv_replicas(heads, n)
    replicated = replace(whole, sharded_over=("kv",), partial_over=("kv_replica",))
    if role is Role.ATTENTION_Q:
        return [ParameterShard(attribute, ranges_spec(split, 0, [even_part(rows, n, t, "the rows of wq")]))]
    if role is Role.ATTENTION_KV:
        if replicas == 1:
            return [ParameterShard(attribute, ranges_spec(split, 0, [even_part(rows, n, t, "the rows of wk and wv")]))]
        return [
            ParameterShard(attribute, ranges_spec(replicated, 0, [(t // replicas * heads.head_dim, heads.head_dim)]))
        ]
    assert role is Role.ATTENTION_QKV, role
    if replicas == 1:
        return [ParameterShard(attribute, ranges_spec(split, 0, [even_part(rows, n, t, "the rows of wqkv")]))]
    group_rows = rows // heads.num_kv_heads
    query_rows = group_rows - 2 * heads.head_dim
    start = t // replicas * group_rows
    queries = even_part(query_rows, replicas, t % replicas, "the queries of a key-value group")
    return [
        ParameterShard(attribute, ranges_spec(split, 0, [(start + queries[0], queries[1])])),
        ParameterShard(f"kv_{attribute}", ranges_spec(replicated, 0, [(start + query_rows, 2 * heads.head_dim)])),
    ]
