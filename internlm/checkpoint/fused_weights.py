"""Loads projections that a checkpoint stores fused and the model holds separately, or the other way round.

    wqkv <-> wq, wk, wv     rows by key-value group: its query heads, its key, its value
    w13  <-> w1, w3         the rows of w1, then those of w3

Both forms contain the same rows in different orders, so a box of one form is a list of boxes of the other. The reader
fetches only these, for weights, biases, masters and moments alike.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from internlm.checkpoint.boxed_tensor import BoxedTensor, merge_by_key
from internlm.core.parallel.shard_spec import Box
from internlm.model.roles import HeadShape
from internlm.utils.errors import CheckpointError

_PARTS = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}
"""Fused weight -> the weights whose rows it contains."""

_NAME = re.compile(r"(?P<module>.*\.)(?P<projection>wqkv|w[qkv]|w13|w[13])(?P<attribute>\.(?:weight|bias))")


class RowRange(NamedTuple):
    """Consecutive rows of a tensor that are consecutive rows of a stored tensor.

    Attributes:
        first: first row in the tensor.
        stored: key of the stored tensor.
        first_stored: first row in the stored tensor.
        num_rows: length of the range.
    """

    first: int
    stored: str
    first_stored: int
    num_rows: int


def other_form(name: str) -> tuple[str, ...]:
    """Names of the tensors that contain the rows of `name` in the other form; empty for a tensor with only one form.

    Args:
        name: a global name or a key of a checkpoint, such as `optimizer/exp_avg/layers.0.attention.wq.weight`.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return ()
    projection = match["projection"]
    others = _PARTS.get(projection) or [fused for fused, parts in _PARTS.items() if projection in parts]
    return tuple(f"{match['module']}{other}{match['attribute']}" for other in others)


def stored_names(name: str, stored: Collection[str]) -> tuple[str, ...]:
    """Names of the tensors in a checkpoint that contain the tensor `name`: itself, or those of its other form."""
    others = other_form(name)
    return others if name not in stored and others and all(other in stored for other in others) else (name,)


def row_ranges(
    key: str, shape: tuple[int, ...], stored: Mapping[str, tuple[int, ...] | None], heads: HeadShape | None
) -> list[RowRange]:
    """Where the rows of a tensor are stored in its other form, in row order.

    Args:
        key: key of the tensor, as in a checkpoint.
        shape: shape of the tensor.
        stored: key -> shape of everything in the checkpoint, including `other_form(key)`.
        heads: heads of the block; required only for query, key and value.

    Raises:
        CheckpointError: the stored shapes do not fit this model.
    """
    others = other_form(key)
    parts = others if len(others) > 1 else other_form(others[0])
    fused = key if len(others) > 1 else others[0]
    fused_shape = shape if fused == key else stored[fused]
    assert fused_shape is not None
    ranges, first_in_fused = [], 0
    for part, first, num_rows in _rows_of_fused(parts, fused_shape[0], heads):
        if fused == key:
            ranges.append(RowRange(first_in_fused, part, first, num_rows))
        elif part == key:
            ranges.append(RowRange(first, fused, first_in_fused, num_rows))
        first_in_fused += num_rows
    expected = dict.fromkeys(others, 0)
    for rows in ranges:
        expected[rows.stored] += rows.num_rows
    fits = sum(expected.values()) == shape[0] and first_in_fused == fused_shape[0]
    for other in others:
        found = stored[other]
        fits &= found is not None and found[1:] == shape[1:] and (fused != key or found[0] == expected[other])
    if not fits:
        found_shapes = ", ".join(f"'{other}' {list(stored[other] or ())}" for other in others)
        raise CheckpointError(f"'{key}' has shape {list(shape)}, but the checkpoint stores its rows as {found_shapes}")
    return ranges


def _rows_of_fused(parts: tuple[str, ...], num_rows: int, heads: HeadShape | None) -> Iterator[tuple[str, int, int]]:
    """(part, first row in the part, number of rows) of the blocks of a fused weight, in their order."""
    if len(parts) == 2:
        for part in parts:
            yield part, 0, num_rows // 2
        return
    if heads is None:
        raise CheckpointError(f"'{parts[0]}' cannot be regrouped: the model does not declare `heads`")
    q, k, v = parts
    key_rows = heads.head_dim
    query_rows = heads.num_heads // heads.num_kv_heads * key_rows
    for group in range(heads.num_kv_heads):
        yield q, group * query_rows, query_rows
        yield k, group * key_rows, key_rows
        yield v, group * key_rows, key_rows


def in_stored_form(
    tensors: Mapping[str, Any], stored: Mapping[str, tuple[int, ...] | None], heads: Mapping[str, HeadShape]
) -> dict[str, Any]:
    """Rename and regroup requested tensors to the keys and shapes of a checkpoint.

    Args:
        tensors: key -> `BoxedTensor`, or a value that is not a tensor.
        stored: key -> shape of everything in the checkpoint.
        heads: see `heads_of`.

    Returns:
        The tensors to read, whose pieces are views of the given ones. Keys that the checkpoint has in neither form are
        unchanged.

    Raises:
        CheckpointError: the stored shapes do not fit this model.
    """
    unchanged: dict[str, Any] = {}
    regrouped: list[tuple[str, BoxedTensor]] = []
    for key, tensor in tensors.items():
        if stored_names(key, stored) == (key,):
            unchanged[key] = tensor
        else:
            ranges = row_ranges(key, tensor.global_shape, stored, _heads_of_block(key, heads))
            regrouped += _regrouped(tensor, ranges, stored)
    return {**unchanged, **merge_by_key(regrouped)}


def _regrouped(
    tensor: BoxedTensor, ranges: list[RowRange], stored: Mapping[str, tuple[int, ...] | None]
) -> Iterator[tuple[str, BoxedTensor]]:
    for rows in ranges:
        pieces = []
        for box, piece in tensor.pieces:
            first, num_rows = box.global_offset[0], box.size[0]
            start, stop = max(first, rows.first), min(first + num_rows, rows.first + rows.num_rows)
            if start < stop:
                part = piece[start - first : stop - first]
                offset = (start - rows.first + rows.first_stored, *box.global_offset[1:])
                pieces.append((Box(offset, (0,) * part.dim(), tuple(part.shape)), part))
        shape = stored[rows.stored]
        if pieces and shape is not None:
            yield rows.stored, BoxedTensor(shape, tensor.dtype, pieces)


def heads_of(chunks: Iterable[nn.Module]) -> dict[str, HeadShape]:
    """Name of a block -> its heads, for blocks that declare them; under "" those of the model, for all other blocks."""
    modules = (named for chunk in chunks for named in chunk.named_modules())
    found = ((name, getattr(module, "heads", None)) for name, module in modules)
    return {name: heads for name, heads in found if isinstance(heads, HeadShape)}


def _heads_of_block(key: str, heads: Mapping[str, HeadShape]) -> HeadShape | None:
    match = _NAME.fullmatch(key)
    assert match is not None, key
    # The key without its section: `layers.0.attention.`
    return heads.get(match["module"].rpartition("/")[2].rstrip("."), heads.get(""))


def describe_regrouping(keys: Collection[str], stored: Collection[str]) -> list[str]:
    """Describe the regrouped projections, one line per kind: `24 x attention.wqkv from wq, wk, wv`.

    Args:
        keys: keys or names of the model's tensors.
        stored: those in the checkpoint.
    """
    modules: dict[str, set[str]] = {}
    for key in keys:
        match = _NAME.fullmatch(key)
        sources = stored_names(key, stored)
        if match is None or sources == (key,):
            continue
        # The key without its section: `layers.0.attention.`
        module = match["module"].rpartition("/")[2]
        kind = module.rstrip(".").rpartition(".")[2]
        wanted, read = match["projection"], [_projection(source) for source in sources]
        if wanted not in _PARTS:
            wanted = ", ".join(_PARTS[read[0]])
        modules.setdefault(f"{kind}.{wanted} from {', '.join(read)}", set()).add(module)
    return [f"{len(found)} x {text}" for text, found in sorted(modules.items())]


def _projection(key: str) -> str:
    match = _NAME.fullmatch(key)
    assert match is not None, key
    return match["projection"]
