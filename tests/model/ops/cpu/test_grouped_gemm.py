"""GEMMs of groups of rows: numbers of rows that are rounded up change no result."""

from __future__ import annotations

import pytest
import torch

from internlm.model.ops.cpu import grouped_gemm
from internlm.model.ops.cpu.gemm import choose_cpu_gemm
from internlm.model.ops.cpu.grouped_gemm import gemm_of_groups, outer_gemm_of_groups
from internlm.model.ops.cpu.native import has_native_ops
from internlm.model.ops.implementation_choice import Choice

SIZES = ([37, 0, 300, 1, 129], [3, 70, 0], [500, 2, 1], [130], [0, 5])
"""Groups that take along rows behind them, before them, and none."""


@pytest.fixture(autouse=True)
def own_format():
    choose_cpu_gemm("dtype")
    yield
    choose_cpu_gemm("auto")


@pytest.fixture(params=["native", "loop"])
def implementation(request, monkeypatch):
    """The own kernel runs on all CPUs with bf16 units, also where the rule chooses the loop."""
    if request.param == "native" and not has_native_ops():
        pytest.skip("needs AVX512-BF16 and a compiler")
    own = Choice(request.param, "of this test")
    monkeypatch.setattr(
        grouped_gemm, "choice", lambda device, dtype: own if dtype == torch.bfloat16 else Choice("loop", "of this test")
    )
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("widths", [(24, 40), (64, 130), (7, 33)], ids=str)
def test_equals_products_of_each_group(sizes, widths, dtype, implementation):
    torch.manual_seed(0)
    num_rows = sum(sizes)
    # Small integers: every product and sum is exact.
    x, grad = (torch.randint(-2, 3, (num_rows, width)).to(dtype) for width in widths)
    inputs, outputs = widths
    matrices = torch.randint(-2, 3, (len(sizes), inputs, outputs)).to(dtype)
    out, same = (torch.full((num_rows, outputs), 7.0, dtype=dtype) for _ in range(2))
    outer = torch.full((len(sizes), outputs, inputs), 7.0, dtype=dtype)
    gemm_of_groups(x, matrices, sizes, out)
    gemm_of_groups(x, matrices.transpose(1, 2).contiguous().transpose(1, 2), sizes, same)
    outer_gemm_of_groups(grad, x, sizes, outer)
    reversed_outer = torch.full((len(sizes), inputs, outputs), 7.0, dtype=dtype)
    outer_gemm_of_groups(x, grad, sizes, reversed_outer)
    rows, grads = x.double().split(sizes), grad.double().split(sizes)
    assert torch.equal(out, torch.cat([a @ b for a, b in zip(rows, matrices.double(), strict=True)]).to(dtype))
    expected = torch.stack([g.t() @ a for g, a in zip(grads, rows, strict=True)]).to(dtype)
    assert torch.equal(same, out)
    assert torch.equal(outer, expected)
    assert torch.equal(reversed_outer, expected.transpose(1, 2))


def test_numbers_of_rows_repeat(monkeypatch):
    """oneDNN generates code for each: few of them may occur for groups of 1,024 to 2,047 rows."""
    shapes = set()

    def record(a, b, out=None):
        shapes.add(tuple(a.shape))
        return a @ b if out is None else torch.mm(a, b, out=out)

    monkeypatch.setattr(grouped_gemm, "gemm", record)
    monkeypatch.setattr(grouped_gemm, "choice", lambda device, dtype: Choice("loop", "of this test"))
    x, out = torch.zeros(6000, 2, dtype=torch.bfloat16), torch.zeros(6000, 2, dtype=torch.bfloat16)
    matrices = torch.zeros(4, 2, 2, dtype=torch.bfloat16)
    for size in range(1024, 2048, 13):
        sizes = [1500, size, 2048 - size, 2452]
        gemm_of_groups(x, matrices, sizes, out)
    assert len({rows for rows, _ in shapes if 1024 <= rows <= 2048}) <= 9
