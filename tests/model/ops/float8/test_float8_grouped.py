"""Linear layers of experts in float8 against their definition, and against the rules of PyTorch's grouped GEMM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.model.ops.float8 import grouped_gemm, grouped_kernels
from internlm.model.ops.float8.grouped_linear import float8_grouped_linear
from internlm.model.ops.float8.scaled_gemm import Scaled, amaxes_of
from internlm.model.ops.implementations import OpSettings, describe
from internlm.model.ops.self_test import float8_grouped_cases, judge

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def scaled_grouped_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, offs: Tensor, out_dtype: Any, use_fast_accum: bool
) -> Tensor:
    """In place of PyTorch's operator, with the rules of its source (`GroupedBlas.cpp`)."""
    (rows, inputs), (experts, _, outputs) = a.shape, b.shape
    assert a.dtype == b.dtype == torch.float8_e4m3fn and out_dtype == torch.bfloat16 and use_fast_accum
    assert a.stride() == (inputs, 1) and b.stride() == (inputs * outputs, 1, inputs) and b.shape[1] == inputs
    assert inputs % 16 == outputs % 16 == 0 and a.data_ptr() % 16 == b.data_ptr() % 16 == 0
    assert scale_a.dtype == scale_b.dtype == torch.float32 and scale_a.is_contiguous() and scale_b.is_contiguous()
    assert scale_a.shape == (rows,) and scale_b.shape == (experts, outputs)
    assert offs.dtype == torch.int32 and offs.shape == (experts,) and offs[-1] == rows
    bounds = [0, *offs.tolist()]
    products = [
        a[bounds[e] : bounds[e + 1]].float() @ b[e].float() * scale_a[bounds[e] : bounds[e + 1], None] * scale_b[e]
        for e in range(experts)
    ]
    return torch.cat(products).to(out_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["emulation", "loop"])
def test_what_doctor_runs(kind: grouped_gemm.Implementation, dtype: torch.dtype) -> None:
    for case in float8_grouped_cases(CPU, linear=partial(float8_grouped_linear, implementation=kind)):
        assert judge(case, CPU, dtype) is None, case.name


def test_the_grouped_gemm_is_called_by_its_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)
    for case in float8_grouped_cases(CPU, linear=partial(float8_grouped_linear, implementation="grouped")):
        assert judge(case, CPU, torch.bfloat16) is None, case.name


def test_the_loop_sums_over_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every GEMM has K and N that are multiples of 16, whatever the numbers of rows."""
    right, shapes = grouped_gemm.scaled_product, []

    def checked(a: Scaled, b: Scaled, dtype: torch.dtype, **options: Any) -> Tensor:
        shapes.append((*a.values.shape, b.values.shape[1]))
        return right(a, b, dtype, **options)

    monkeypatch.setattr(grouped_gemm, "scaled_product", checked)
    x, weight = torch.randn(24, 32).bfloat16().requires_grad_(), torch.randn(4, 48, 32).bfloat16().requires_grad_()
    out = float8_grouped_linear(x, weight, torch.tensor([5, 0, 1, 18]), implementation="loop")
    out.sum().backward()
    assert len(shapes) == 9 and all(k % 16 == 0 and n % 16 == 0 for _, k, n in shapes)
    assert weight.grad is not None and torch.count_nonzero(weight.grad[1]) == 0


_QUANTIZE = grouped_kernels.quantize


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("quantize", lambda tensor, scale, format: _QUANTIZE(tensor, scale, torch.float8_e5m2)),
        ("quantize", lambda tensor, scale, format: _QUANTIZE(tensor * (1 + 2.0**-7), scale, format)),
        # One scale for all.
        (
            "amaxes_of",
            lambda tensor: amaxes_of(tensor).amax().expand(len(tensor)) if len(tensor) else amaxes_of(tensor),
        ),
        ("_largest_of_experts", lambda amaxes, counts: amaxes),
    ],
)
def test_what_is_wrong_is_found(name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_kernels, name, wrong)
    assert any(judge(case, CPU, torch.bfloat16) is not None for case in float8_grouped_cases(CPU))


@pytest.mark.parametrize("kind", ["emulation", "loop"])
def test_what_is_not_finite_stays_visible(kind: grouped_gemm.Implementation) -> None:
    """In its row, and in the gradients of the weight of its expert."""
    for value in (torch.inf, torch.nan):
        x, weight = torch.randn(8, 16), torch.randn(2, 16, 16).requires_grad_()
        x[3, 5] = value
        out = float8_grouped_linear(x, weight, torch.tensor([4, 4]), implementation=kind)
        out.backward(torch.ones_like(out))
        assert weight.grad is not None
        assert out[3].isnan().all() and out[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
        assert not weight.grad[0].isfinite().any() and weight.grad[1].isfinite().all()


def test_rows_of_zeros_have_gradients() -> None:
    x, weight = torch.zeros(4, 16).requires_grad_(), torch.eye(16).repeat(2, 1, 1)
    out = float8_grouped_linear(x, weight, torch.tensor([4, 0]))
    assert torch.count_nonzero(out) == 0
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(grad, torch.ones(4, 16))


def test_what_runs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = OpSettings(use_float8=True)
    assert "float8_grouped_linear" not in describe("cpu")
    assert describe("cpu", settings)["float8_grouped_linear"].implementation.startswith("emulation; ")
    for major, implementation in ((9, "torch._scaled_grouped_mm"), (10, "torch._scaled_mm in a loop")):
        monkeypatch.setattr(grouped_gemm, "runs_on_hardware", lambda device: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert grouped_gemm.choice(CUDA).implementation.startswith(implementation)
