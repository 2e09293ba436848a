"""Partial attention on a GPU: the ranks of a ring in one process against plain attention in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from helpers.partial_attention import by_parts, inputs, plain, random_cut, relative_errors, visible

from internlm.model.ops.attention.attention_tiles import Tile
from internlm.model.ops.attention.partial_attention import add_partial_attention
from internlm.model.ops.implementations import OpSettings
from internlm.model.ops.self_test import judge, partial_attention_cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _exact_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    """GEMMs of fp32 are not rounded to TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 70, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_random_cuts(seed: int, window: int | None, dtype: torch.dtype) -> None:
    """MHA, GQA and MQA; values of the width of keys, smaller, larger; head dimensions that are not multiples of 8."""
    draw = random.Random(f"{seed} {window}")
    heads, dims = ((4, 4), (6, 2), (4, 1))[seed % 3], ((64, 64), (128, 64), (20, 36))[draw.randrange(3)]
    cut = random_cut(draw, draw.choice((9, 80, 190, 1500)), draw.choice((1, 2, 4)))
    tensors = [x.to(CUDA) for x in inputs(cut.num_tokens, heads, dims, dtype, seed)]
    scale = 1 / math.sqrt(dims[0])
    theirs = plain(*tensors, visible(cut, window), scale)
    ours = by_parts(*tensors, cut, window, scale)
    # Each part of a result is rounded to 16 bits; scores in fp32 have an error of some units in the last place.
    bound = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 8 * torch.finfo(dtype).eps)
    for error, truth in zip(relative_errors(ours, theirs), theirs, strict=True):
        assert error < bound or truth.norm() < 1e-9


@pytest.mark.parametrize("num_parts", [1, 2, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_parts_are_as_exact_as_the_formula(dtype: torch.dtype, head_dim: int, num_parts: int) -> None:
    lengths = (300, 0, 1, 723)
    for case in partial_attention_cases(CUDA, OpSettings(dtype, head_dim), lengths, num_parts=num_parts):
        assert judge(case, CUDA, dtype) is None, case.name


def test_the_host_does_not_wait_for_the_device() -> None:
    q, k, v, _ = (x.to(CUDA) for x in inputs(256, (4, 2), (64, 64), torch.bfloat16))
    out = torch.zeros(256, 4, 64, device=CUDA)
    lse = torch.full((256, 4), -math.inf, device=CUDA)
    tiles = [Tile(0, 128, 0, 128, 0), Tile(128, 256, 0, 256, 128), Tile(0, 128, 128, 256, None)]
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        add_partial_attention(out, lse, q, k, v, tiles, window=50)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert out.isfinite().all() and lse.isfinite().all()
