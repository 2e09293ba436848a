"""Partial attention: all ranks of a ring in one process, merged and summed, against plain attention in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.partial_attention import (
    Cut,
    by_parts,
    inputs,
    largest_error,
    plain,
    random_cut,
    relative_errors,
    visible,
    zigzag,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from internlm.model.ops.attention import partial_attention as partial_module
from internlm.model.ops.attention.attention_tiles import needs_mask, pieces, row_bands, trimmed
from internlm.model.ops.attention.causal_attention import attention
from internlm.model.ops.attention.partial_attention import (
    Tile,
    add_partial_attention,
    choice,
    partial_attention_backward,
)
from internlm.model.ops.attention.partial_kernels import BatchedGemms, CpuFlash, CudaFlash
from internlm.model.ops.cpu.native import has_native_ops

CPU = torch.device("cpu")


class FlashOfCuda:
    """The operators of flash attention on CUDA, as documented: queries and keys are aligned at their ends."""

    def __init__(self) -> None:
        self.num_calls = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        self.num_calls += 1
        assert q.shape[-1] % 8 == 0 and q.shape[-1] == k.shape[-1] == v.shape[-1]
        scores = self._scores(q, k, *arguments, **options)
        lse = scores.logsumexp(-1)
        assert lse.isfinite().all()
        return torch.einsum("nhij,njhd->nihd", (scores - lse[..., None]).exp(), self._copied(v, q)), lse, q, q, q

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *arguments: object,
        **options: object,
    ) -> tuple[Tensor, ...]:
        assert lse.is_contiguous()
        weights = (self._scores(q, k, *arguments[:-2], False, **options) - lse[..., None]).exp()
        mean = (grad * out).sum(-1).transpose(1, 2)[..., None]
        grad_scores = weights * (torch.einsum("nihd,njhd->nhij", grad, self._copied(v, q)) - mean) * options["scale"]
        return (
            torch.einsum("nhij,njhd->nihd", grad_scores, self._copied(k, q)),
            torch.einsum("nhij,nihd->njhd", grad_scores, q).unflatten(2, (k.shape[2], -1)).sum(3),
            torch.einsum("nhij,nihd->njhd", weights, grad).unflatten(2, (k.shape[2], -1)).sum(3),
        )

    def _scores(
        self,
        q: Tensor,
        k: Tensor,
        _q: object,
        _k: object,
        max_q: int,
        max_k: int,
        p: float,
        causal: bool,
        _: bool,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> Tensor:
        assert (max_q, max_k, p) == (q.shape[1], k.shape[1], 0.0)
        shift = torch.arange(max_k) - torch.arange(max_q)[:, None] - (max_k - max_q)
        right = 0 if causal else window_size_right
        hidden = (shift > right) & (right >= 0) | (-shift > window_size_left) & (window_size_left >= 0)
        scores = torch.einsum("nihd,njhd->nhij", q, self._copied(k, q)) * scale
        return scores.masked_fill(hidden, -math.inf)

    @staticmethod
    def _copied(x: Tensor, q: Tensor) -> Tensor:
        return x.repeat_interleave(q.shape[2] // x.shape[2], dim=2)


@pytest.fixture(params=["CpuFlash", "CudaFlash", "BatchedGemms"])
def exact_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels in float64; those of CUDA are written out."""
    kernel = {"CpuFlash": CpuFlash, "CudaFlash": CudaFlash, "BatchedGemms": BatchedGemms}[request.param]()
    monkeypatch.setattr(partial_module, "_kernel", lambda *_: kernel)
    flash = FlashOfCuda()
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash.forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash.backward)
    yield request.param
    assert (flash.num_calls > 0) == (request.param == "CudaFlash")


@pytest.fixture(params=["fp32", *(["native"] if has_native_ops() else [])])
def bf16_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels of a CPU for bf16."""
    if request.param == "fp32":
        monkeypatch.setattr(partial_module, "_is_native", lambda *_: False)
    name: str = request.param
    return name


@pytest.mark.parametrize("window", [None, 1, 7, 70, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_random_cuts_give_plain_attention(seed: int, window: int | None, exact_kernel: str) -> None:
    cut, tensors, scale = _random_case(seed, window, torch.float64)
    theirs = plain(*tensors, visible(cut, window), scale)
    assert largest_error(by_parts(*tensors, cut, window, scale), theirs) < 1e-13


def _random_case(seed: int, window: int | None, dtype: torch.dtype) -> tuple[Cut, list[Tensor], float]:
    """MHA, GQA or MQA; values of the width of keys, smaller, larger."""
    draw = random.Random(f"{seed} {window}")
    heads, dims = ((4, 4), (6, 2), (4, 1))[seed % 3], ((8, 8), (12, 8), (8, 20))[draw.randrange(3)]
    cut = random_cut(draw, draw.choice((1, 9, 80, 190)) if seed else 700, draw.choice((1, 2, 4)))
    return cut, inputs(cut.num_tokens, heads, dims, dtype, seed), draw.choice((0.3, 1 / math.sqrt(dims[0])))


@pytest.mark.parametrize("window", [None, 1, 7, 70, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_random_cuts_in_bf16(seed: int, window: int | None, bf16_kernel: str) -> None:
    cut, tensors, scale = _random_case(seed, window, torch.bfloat16)
    theirs = plain(*tensors, visible(cut, window), scale)
    # Rounding to bf16 has an error of at most 2^-9; probabilities, gradients of scores and results are rounded. Where a
    # gradient is zero, as that of a query with one key, so is what is compared with.
    for mine, truth in zip(by_parts(*tensors, cut, window, scale), theirs, strict=True):
        bound = 3 * 2**-9 * truth.norm() + 2**-7 * (truth.norm() < 1e-9) * truth.numel() ** 0.5
        assert (mine.double() - truth).norm() <= bound


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
def test_bf16_is_as_exact_as_one_call(heads: tuple[int, int], bf16_kernel: str) -> None:
    """Also of 16 blocks of keys, as parts are summed in fp32."""
    length, scale = 384, 1 / 8
    q, k, v, grad_out = inputs(length, heads, (64, 64), torch.bfloat16)
    leaves = [x[None].clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    one_call = (out[0], *(x[0] for x in torch.autograd.grad(out, leaves, grad_out[None])))
    for num_ranks in (1, 2, 4, 8):
        cut = zigzag(length, num_ranks)
        theirs = plain(q, k, v, grad_out, visible(cut, None), scale)
        parts = [x.bfloat16() for x in by_parts(q, k, v, grad_out, cut, None)]
        allowed = [1.5 * error for error in relative_errors(one_call, theirs)]
        assert all(mine <= bound for mine, bound in zip(relative_errors(parts, theirs), allowed, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    """Scores of thousands, so that parts have nearly all the weight or none, and exponentials overflow in any order."""
    cut = zigzag(96, 4, (50, 46))
    q, k, v, grad_out = inputs(96, (4, 2), (16, 16), dtype)
    q, k = 30 * q, 30 * k
    theirs = plain(q, k, v, grad_out, visible(cut, None), 1.0)
    ours = by_parts(q, k, v, grad_out, cut, None, 1.0)
    assert all(x.isfinite().all() for x in ours)
    # The spacing of scores of up to 1e4 is 1e-12 in float64 and 1e-3 in fp32.
    assert max(relative_errors(ours, theirs)) < (1e-10 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_below_the_range_of_exponentials(dtype: torch.dtype) -> None:
    """All scores are about -200, where the exponential of a padded key's score of 0 over the others overflows."""
    q, k, v, grad_out = inputs(70, (4, 2), (16, 16), dtype)
    q[..., 0], k[..., 0] = 20, -20
    cut = Cut((70,), (((0, 35),), ((35, 70),)))
    theirs = plain(q, k, v, grad_out, visible(cut, None), 0.5)
    ours = by_parts(q, k, v, grad_out, cut, None, 0.5)
    assert all(x.isfinite().all() for x in ours)
    # The gradient of the large channel of queries is the sum of gradients of scores, which is zero but for rounding.
    ours, theirs = ((x[0], x[1][..., 1:], *x[2:]) for x in (ours, theirs))
    assert max(relative_errors(ours, theirs)) < {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 1e-2)


@pytest.mark.parametrize("window", [None, 20])
def test_results_are_bitwise_repeatable(window: int | None) -> None:
    """Those of the C++ kernel with any number of threads."""
    cut = zigzag(200, 4, (90, 3, 107))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors = inputs(200, (4, 2), (16, 16), dtype)
        first, second = (by_parts(*tensors, cut, window) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    if has_native_ops():
        num_threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            second = by_parts(*tensors, cut, window)
        finally:
            torch.set_num_threads(num_threads)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
def test_any_strides(window: int | None, dtype: torch.dtype) -> None:
    """Heads before tokens, channels before both, and a gradient that is one number."""
    cut = zigzag(96, 1, (50, 46))
    q, k, v, _ = inputs(96, (4, 2), (16, 16), dtype)
    ones = torch.ones((), dtype=dtype).expand(96, 4, 16)
    expected = by_parts(q, k, v, ones.contiguous(), cut, window)
    tiles = cut.tiles(0, 0)
    wide = torch.promote_types(dtype, torch.float32)
    for arrange in (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.mT.contiguous().mT):
        arranged = [arrange(x) for x in (q, k, v)]
        out, lse = torch.zeros_like(q, dtype=wide), q.new_full((96, 4), -math.inf, dtype=wide)
        add_partial_attention(out, lse, *arranged, tiles, window=window)
        grads = [torch.zeros(x.shape, dtype=wide) for x in (q, k, v)]
        names = dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))
        partial_attention_backward(
            ones, *arranged, arrange(out), arrange(lse[..., None])[..., 0], tiles, window=window, **names
        )
        for mine, theirs in zip((out, *grads), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_queries_without_a_key_stay_as_they_are(dtype: torch.dtype) -> None:
    q, k, v, grad_out = inputs(40, (2, 1), (8, 8), dtype)
    wide = torch.promote_types(dtype, torch.float32)
    out, lse = torch.full((40, 2, 8), 7.0, dtype=wide), torch.full((40, 2), 3.0, dtype=wide)
    grads = {f"grad_{name}": torch.zeros(x.shape, dtype=wide) for name, x in (("q", q), ("k", k), ("v", v))}
    # Of queries 10 to 29, only 15 to 27 see any of the keys 5 to 14: from the first key on, within the window.
    tiles = [
        Tile(10, 30, 5, 15, -5),
        Tile(3, 3, 0, 9, None),
        Tile(3, 9, 2, 2, 0),
        Tile(0, 4, 0, 8, -4),
        Tile(0, 4, 0, 8, 30),
    ]
    add_partial_attention(out, lse, q, k, v, tiles, window=4)
    partial_attention_backward(grad_out, q, k, v, out, lse, tiles, window=4, **grads)
    touched = [*range(15, 28)]
    for x, before in ((out, 7.0), (lse, 3.0), (grads["grad_q"], 0.0)):
        assert [row for row in range(40) if (x[row] != before).any()] == touched
    assert [row for row in range(40) if grads["grad_v"][row].any()] == [*range(5, 15)]
    add_partial_attention(out[:0], lse[:0], q[:0], k[:0], v[:0], [], window=None)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_dim", "expected"),
    [
        ("cuda", (9, 0), torch.bfloat16, 128, "PyTorch's flash attention 2"),
        ("cuda", (8, 9), torch.float16, 192, "PyTorch's flash attention 2"),
        ("cuda", (8, 9), torch.float16, 256, "up to 192 on this GPU, the model has 256"),
        ("cuda", (9, 0), torch.bfloat16, 576, "up to 256 on this GPU, the model has 576"),
        ("cuda", (9, 0), torch.float32, 64, "does not support float32"),
        ("cuda", (7, 5), torch.float16, 64, "this GPU has 7.5"),
        ("mps", None, torch.bfloat16, 64, "no flash attention on mps"),
        ("cpu", None, torch.float32, 64, "flash attention in fp32"),
    ],
)
def test_the_choice_says_why(
    device: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(partial_module, "capability_of", lambda _: capability)
    found = choice(torch.device(device), dtype, head_dim)
    assert expected in f"{found.implementation}; {found.reason}"


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(-50, 50)),
    st.one_of(st.none(), st.integers(1, 60)),
    st.integers(1, 50),
)
def test_splits_have_every_visible_pair_once(
    num_queries: int, num_keys: int, distance: int | None, window: int | None, size: int
) -> None:
    """And each query of a piece sees a key. The limits on pieces with a window are small here, so that all occur."""
    tile = Tile(3, 3 + num_queries, 5, 5 + num_keys, distance)
    expected = seen(tile, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("internlm.model.ops.attention.attention_tiles._BAND", 3)
        patch.setattr("internlm.model.ops.attention.attention_tiles._EDGE", 7)
        splits = [list(pieces([tile], window)), list(row_bands(tile, window, size))]
    splits.append([rest] if (rest := trimmed(tile, window)) is not None else [])
    for split in splits:
        total = torch.zeros_like(expected, dtype=torch.int64)
        for piece in split:
            own = seen(piece, window)
            assert own.any(1)[piece.q_start : piece.q_stop].all() and own.any(0)[piece.k_start : piece.k_stop].all()
            total += own
        assert torch.equal(total, expected.long())
    for piece in splits[0]:
        assert window is not None or not needs_mask(piece, window)
        if not needs_mask(piece, window) and piece.distance is not None:
            assert piece.is_causal_square


def seen(tile: Tile, window: int | None) -> Tensor:
    """`[60, 60]`: which query sees which key, pair by pair."""
    result = torch.zeros(60, 60, dtype=torch.bool)
    for i in range(tile.num_queries):
        for j in range(tile.num_keys):
            apart = None if tile.distance is None else tile.distance + i - j
            if apart is None or (apart >= 0 and (window is None or apart < window)):
                result[tile.q_start + i, tile.k_start + j] = True
    return result
