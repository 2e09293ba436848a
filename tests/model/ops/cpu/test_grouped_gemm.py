"""GEMMs of groups of rows: numbers of rows that are rounded up change no result."""

from __future__ import annotations

import pytest
import torch

from internlm.model.ops.cpu import grouped_gemm
from internlm.model.ops.cpu.gemm import choose_cpu_gemm
from internlm.model.ops.cpu.grouped_gemm import gemm_of_groups, outer_gemm_of_groups

SIZES = ([37, 0, 300, 1, 129], [3, 70, 0], [500, 2, 1], [130], [0, 5])
"""Groups that take along rows behind them, before them, and none."""


@pytest.fixture(autouse=True)
def own_format():
    choose_cpu_gemm("dtype")
    yield
    choose_cpu_gemm("auto")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_products_of_each_group(sizes, dtype):
    torch.manual_seed(0)
    num_rows = sum(sizes)
    # Small integers: every product and sum is exact.
    x, grad = (torch.randint(-2, 3, (num_rows, width)).to(dtype) for width in (24, 40))
    matrices = torch.randint(-2, 3, (len(sizes), 24, 40)).to(dtype)
    out, outer = torch.full((num_rows, 40), 7.0, dtype=dtype), torch.full((len(sizes), 40, 24), 7.0, dtype=dtype)
    gemm_of_groups(x, matrices, sizes, out)
    outer_gemm_of_groups(grad, x, sizes, outer)
    reversed_outer = torch.full((len(sizes), 24, 40), 7.0, dtype=dtype)
    outer_gemm_of_groups(x, grad, sizes, reversed_outer)
    rows, grads = x.double().split(sizes), grad.double().split(sizes)
    assert torch.equal(out, torch.cat([a @ b for a, b in zip(rows, matrices.double(), strict=True)]).to(dtype))
    expected = torch.stack([g.t() @ a for g, a in zip(grads, rows, strict=True)]).to(dtype)
    assert torch.equal(outer, expected)
    assert torch.equal(reversed_outer, expected.transpose(1, 2))


def test_numbers_of_rows_repeat(monkeypatch):
    """oneDNN generates code for each: few of them may occur for groups of 1,024 to 2,047 rows."""
    shapes = set()

    def record(a, b, out=None):
        shapes.add(tuple(a.shape))
        return a @ b if out is None else torch.mm(a, b, out=out)

    monkeypatch.setattr(grouped_gemm, "gemm", record)
    x, out = torch.zeros(6000, 2, dtype=torch.bfloat16), torch.zeros(6000, 2, dtype=torch.bfloat16)
    matrices = torch.zeros(4, 2, 2, dtype=torch.bfloat16)
    for size in range(1024, 2048, 13):
        sizes = [1500, size, 2048 - size, 2452]
        gemm_of_groups(x, matrices, sizes, out)
    assert len({rows for rows, _ in shapes if 1024 <= rows <= 2048}) <= 9
