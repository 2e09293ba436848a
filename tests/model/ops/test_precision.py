"""Every op against its formula in float64, results and gradients, on shapes and layouts that nobody would choose: odd
sizes, no token, one token, empty documents, views with strides of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from internlm.model.ops import cross_entropy as cross_entropy_module
from internlm.model.ops import reference
from internlm.model.ops.attention.causal_attention import VarlenMetadata, attention
from internlm.model.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from internlm.model.ops.gated_activation import Activation, gated_activation
from internlm.model.ops.norm import layer_norm, rms_norm
from internlm.model.ops.rotary import RotaryTables, apply_rotary

few = settings(max_examples=20, deadline=None)
ROWS = st.lists(st.integers(0, 4), min_size=0, max_size=3)
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "expanded"])


def _leaf(shape: Sequence[int], layout: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A leaf and a view of it with this shape, laid out as said."""
    draw = partial(torch.randn, generator=generator, dtype=torch.float64, requires_grad=True)
    if layout == "transposed" and len(shape) >= 2:
        leaf = draw((*shape[:-2], shape[-1], shape[-2]))
        return leaf, leaf.transpose(-1, -2)
    if layout == "strided" and shape:
        leaf = draw((*shape[:-1], 2 * shape[-1] + 1))
        return leaf, leaf[..., 1::2]
    if layout == "expanded" and len(shape) >= 2:
        leaf = draw((1, *shape[1:]))
        return leaf, leaf.expand(*shape)
    leaf = draw(tuple(shape))
    return leaf, leaf


def _compare(
    run: Callable[..., Any], formula: Callable[..., Any], shapes: Sequence[Sequence[int]], layout: str, seed: int = 0
) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaves, views = zip(*(_leaf(shape, layout, generator) for shape in shapes), strict=True)
    ours, theirs = (out if isinstance(out, tuple) else (out,) for out in (run(*views), formula(*views)))
    grads = []
    for mine, truth in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, truth)
        # The gradient of a sum is expanded, with strides of zero.
        random = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
        grads.append(torch.ones((), dtype=torch.float64).expand(truth.shape) if layout == "expanded" else random)
    for mine, truth in zip(
        torch.autograd.grad(ours, leaves, grads), torch.autograd.grad(theirs, leaves, grads), strict=True
    ):
        torch.testing.assert_close(mine, truth)


@few
@given(rows=ROWS, width=st.integers(1, 9), layout=LAYOUTS, unit_offset=st.booleans())
def test_norms(rows: list[int], width: int, layout: str, unit_offset: bool) -> None:
    _compare(
        partial(rms_norm, eps=1e-3, unit_offset=unit_offset),
        partial(reference.rms_norm, eps=1e-3, unit_offset=unit_offset),
        ((*rows, width), (width,)),
        layout,
    )
    shapes = ((*rows, width), (width,), (width,))
    _compare(partial(layer_norm, eps=1e-3), partial(reference.layer_norm, eps=1e-3), shapes, layout)
    _compare(
        partial(layer_norm, bias=None, eps=1e-3), partial(reference.layer_norm, bias=None, eps=1e-3), shapes[:2], layout
    )


@few
@given(rows=ROWS, width=st.integers(1, 9), layout=LAYOUTS, activation=st.sampled_from(["silu", "gelu_tanh"]))
def test_gated_activations(rows: list[int], width: int, layout: str, activation: Activation) -> None:
    formula = partial(reference.gated_activation, activation=activation)
    shape = (*rows, width)
    _compare(partial(gated_activation, activation=activation), formula, (shape, shape), layout)


@few
@given(
    batch=st.integers(1, 3),
    length=st.integers(0, 7),
    heads=st.integers(1, 3),
    pairs=st.integers(1, 4),
    layout=LAYOUTS,
    interleaved=st.booleans(),
)
def test_rotary(batch: int, length: int, heads: int, pairs: int, layout: str, interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    angles = torch.randn(batch, length, pairs, generator=generator, dtype=torch.float64)
    tables = RotaryTables.of(angles, interleaved, torch.float64)
    turn = partial(reference.rotary, angles=angles, interleaved=interleaved)
    _compare(partial(apply_rotary, tables=tables), turn, ((batch, length, heads, 2 * pairs),), layout)


@few
@given(
    tokens=st.integers(0, 12),
    width=st.integers(1, 6),
    vocab=st.integers(1, 9),
    chunk=st.integers(1, 13),
    cached=st.sampled_from([1, 20, 1 << 19]),
    smoothing=st.sampled_from([0.0, 0.2]),
    z_loss=st.sampled_from([0.0, 0.1]),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_loss(
    tokens: int,
    width: int,
    vocab: int,
    chunk: int,
    cached: int,
    smoothing: float,
    z_loss: float,
    layout: str,
    ignored: float,
) -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORE_INDEX

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, labels, label_smoothing=smoothing, z_loss_coeff=z_loss, chunk_tokens=chunk
        ).loss_sum

    formula = partial(reference.linear_cross_entropy, labels=labels, label_smoothing=smoothing, z_loss_coeff=z_loss)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy_module, "_CACHE_ELEMENTS", cached)
        _compare(run, formula, ((tokens, width), (vocab, width)), layout)


@few
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 0),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    window=st.none() | st.integers(1, 11),
    scale=st.sampled_from([None, 0.7]),
    layout=LAYOUTS,
)
def test_packed_attention(
    lengths: list[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int | None,
    scale: float | None,
    layout: str,
) -> None:
    varlen = VarlenMetadata.of(tuple(lengths))
    total = sum(lengths)
    shapes = tuple((1, total, heads, head_dim) for heads in (kv_heads * group, kv_heads, kv_heads))
    _compare(
        partial(attention, varlen=varlen, window=window, scale=scale),
        partial(reference.attention, cu_seqlens=varlen.cu_seqlens, window=window, scale=scale),
        shapes,
        layout,
    )


@few
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    cached=st.integers(0, 9),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    window=st.none() | st.integers(1, 11),
    layout=LAYOUTS,
)
def test_attention_over_rows_and_caches(
    batch: int, queries: int, cached: int, heads: tuple[int, int], window: int | None, layout: str
) -> None:
    keys = queries + cached
    shapes = ((batch, queries, heads[0], 3), (batch, keys, heads[1], 3), (batch, keys, heads[1], 3))
    _compare(partial(attention, window=window), partial(reference.attention, window=window), shapes, layout)
