"""The self-test that `internlm doctor` and the tests on a GPU share: right ops pass it, each kind of error fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from internlm.model.ops import reference
from internlm.model.ops.float8 import kernels
from internlm.model.ops.float8.scaled_gemm import Scaled
from internlm.model.ops.implementations import OpSettings, describe
from internlm.model.ops.self_test import LENGTHS, OpCase, attention_cases, float8_cases, judge, other_cases, self_tests

CPU = torch.device("cpu")
SETTINGS = OpSettings(head_dim=16, use_float8=True)


def test_every_op_is_tested_and_right() -> None:
    outcomes = list(self_tests(CPU, SETTINGS))
    assert {outcome.op for outcome in outcomes} == set(describe(CPU, SETTINGS))
    assert {outcome.dtype for outcome in outcomes} == {torch.bfloat16, torch.float32}
    assert {outcome.dtype for outcome in outcomes if outcome.op == "float8_linear"} == {torch.bfloat16}
    assert "float8_linear" not in {outcome.op for outcome in self_tests(CPU, OpSettings(head_dim=16))}
    assert [outcome for outcome in outcomes if outcome.problem is not None] == []


def _case(op: str, run: Callable[..., Tensor], formula: Callable[..., Tensor]) -> OpCase:
    return OpCase(op, "wrong", run, formula, ((3, 40), (40,)))


def _formula(x: Tensor, weight: Tensor) -> Tensor:
    return reference.rms_norm(x, weight, 1e-5)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _formula(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.shapes = [x.shape for x in inputs]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def, override]
        return tuple(grad.new_ones(shape) for shape in ctx.shapes)


def _raise(x: Tensor, weight: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("run", "problem"),
    [
        (lambda x, w: _formula(x, w) * 1.03, "the result has a relative error of 3"),
        (lambda x, w: _formula(x, w) * torch.nan, "the result has a relative error of nan"),
        (lambda x, w: _formula(x, w)[:2], r"the result has shape \[2, 40\] instead of \[3, 40\]"),
        (lambda x, w: (_formula(x, w), x), "4 results and gradients instead of 3"),
        (lambda *inputs: _WrongGradient.apply(*inputs), "the gradient of input 1 has a relative error of"),
        (_raise, "RuntimeError: no kernel image is available$"),
    ],
)
def test_what_is_wrong_is_found_and_named(run: Callable[..., Tensor], problem: str, dtype: torch.dtype) -> None:
    import re

    found = judge(_case("rms_norm", run, _formula), CPU, dtype)
    assert found is not None and re.search(problem, found)
    assert judge(_case("rms_norm", _formula, _formula), CPU, dtype) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_masks_are_found(dtype: torch.dtype) -> None:
    """A key too many or too few in the window, and documents that see each other."""
    cases = {case.name: case for case in attention_cases(CPU, SETTINGS, dtype)}

    def wrong(name: str, formula: Callable[..., Tensor]) -> str | None:
        case = cases[name]
        return judge(OpCase(case.op, case.name, formula, case.formula, case.shapes), CPU, dtype)

    bounds = torch.tensor([0, 37, 37, 38, 128])
    assert sum(LENGTHS) == bounds[-1]
    for name, window in (("rows, window of 33, auto", 32), ("rows, window of 33, auto", 34), ("rows, auto", 33)):
        assert wrong(name, lambda q, k, v, window=window: reference.attention(q, k, v, window=window)) is not None
    assert wrong("packed documents, auto", lambda q, k, v: reference.attention(q, k, v, bounds)) is None
    assert wrong("packed documents, auto", lambda q, k, v: reference.attention(q, k, v)) is not None
    shifted = torch.tensor([0, 37, 37, 39, 128])
    assert wrong("packed documents, auto", lambda q, k, v: reference.attention(q, k, v, shifted)) is not None


_QUANTIZE, _SCALE = kernels.quantize, kernels.scale_of


def _cut_off(tensor: Tensor, scale: Tensor, format: torch.dtype) -> Scaled:
    """Towards zero."""
    nearest = _QUANTIZE(tensor, scale, format)
    is_too_large = nearest.to_float().abs() > tensor.abs()
    below = nearest.values.view(torch.uint8) - is_too_large.to(torch.uint8)
    return Scaled(below.view(format), scale)


def _ties_away(tensor: Tensor, scale: Tensor, format: torch.dtype) -> Scaled:
    """The larger of two that are as near."""
    return _QUANTIZE(tensor * (1 + 2.0**-7), scale, format)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("quantize", _cut_off),
        ("quantize", _ties_away),
        ("quantize", lambda tensor, scale, format: _QUANTIZE(tensor, scale, torch.float8_e5m2)),
        ("quantize", lambda tensor, scale, format: _QUANTIZE(tensor, scale, torch.float8_e4m3fn)),
        ("scale_of", lambda amax, format: _SCALE(amax, format) * 2),
        ("scale_of", lambda amax, format: _SCALE(amax, format) / 2),
        ("scaled_product", lambda a, b, dtype, **options: (a.to_float() @ b.to_float() * 1.03).to(dtype)),
        ("scaled_product", lambda a, b, dtype, **options: a.values.to(dtype) @ b.values.to(dtype)),
    ],
)
def test_wrong_float8_is_found(name: str, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(float8_cases(CPU))
    assert [judge(case, CPU, torch.bfloat16) for case in cases] == [None] * len(cases)
    monkeypatch.setattr(kernels, name, wrong)
    assert any(judge(case, CPU, torch.bfloat16) is not None for case in cases)


def test_formulas_agree_with_pytorch() -> None:
    """The formulas are written out; here they meet implementations that are not ours."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    functional = torch.nn.functional
    x, weight, bias = draw(4, 9), draw(9), draw(9)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-3), functional.rms_norm(x, (9,), weight, 1e-3))
    torch.testing.assert_close(
        reference.layer_norm(x, weight, bias, 1e-3), functional.layer_norm(x, (9,), weight, bias, 1e-3)
    )
    torch.testing.assert_close(reference.gated_activation(x, x + 1, "silu"), functional.silu(x) * (x + 1))
    torch.testing.assert_close(
        reference.gated_activation(x, x + 1, "gelu_tanh"), functional.gelu(x, approximate="tanh") * (x + 1)
    )
    q, k, v = draw(2, 7, 6, 4), draw(2, 7, 2, 4), draw(2, 7, 2, 4)
    theirs = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(reference.attention(q, k, v), theirs.transpose(1, 2))
    # The last query of a cache is that of the whole row.
    torch.testing.assert_close(reference.attention(q[:, 5:], k, v), reference.attention(q, k, v)[:, 5:])


def test_all_cases_have_names_of_their_own() -> None:
    cases = [*attention_cases(CPU, SETTINGS, torch.float32), *other_cases(CPU, SETTINGS), *float8_cases(CPU)]
    assert len({(case.op, case.name) for case in cases}) == len(cases)
