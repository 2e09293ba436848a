"""Float8 products against exact ones of the same numbers, against torchao, and at the edges of the format."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear

from internlm.model.ops.float8 import scaled_gemm as float8
from internlm.model.ops.float8.linear import float8_linear
from internlm.model.ops.float8.scaled_gemm import (
    FORWARD_FORMAT,
    GRADIENT_FORMAT,
    Scaled,
    amax_of,
    quantize,
    scale_of,
    scaled_product,
)
from internlm.model.ops.implementations import OpSettings, describe
from internlm.model.ops.reference import rounded_to_float8

T, IN, OUT = 48, 64, 32


def case(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias, and a gradient of the output, of the sizes that training has."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    x, weight = normal(3, T // 3, IN, scale=1.0), normal(OUT, IN, scale=0.02)
    return x, weight, normal(OUT, scale=1.0), normal(3, T // 3, OUT, scale=1e-5)


def gradients(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Output, and gradients of x, weight and bias."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    out = float8_linear(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def rounded(tensor: Tensor, format: torch.dtype) -> Tensor:
    """What float8 makes of a tensor, in float64, by the definition alone: the nearest of all numbers of the format."""
    limit = torch.finfo(format).max
    scale = 2.0 ** math.ceil(math.log2(float(tensor.abs().max()) / limit))
    bits = torch.arange(256, dtype=torch.uint8).view(format).double()
    numbers = bits[bits.isfinite()].unique()
    scaled = tensor.double() / scale
    distances = (scaled.unsqueeze(-1) - numbers).abs()
    nearest = distances.amin(-1, keepdim=True)
    # Of two that are as near, the one whose fraction is even: its last bit is 0.
    is_even = numbers.to(format).view(torch.uint8) % 2 == 0
    preferred = torch.where(distances == nearest, 1.0 + is_even, 0.0).argmax(-1)
    return numbers[preferred] * scale


def test_the_formula_of_rounding_is_the_definition() -> None:
    """What `internlm doctor` compares with: numbers of all sizes, and all that lie between two neighbours."""
    generator = torch.Generator().manual_seed(4)
    sizes = 2.0 ** -torch.linspace(0, 40, 2000, dtype=torch.float64)
    drawn = torch.randn(2000, generator=generator, dtype=torch.float64) * sizes
    for format in (FORWARD_FORMAT, GRADIENT_FORMAT):
        bits = torch.arange(256, dtype=torch.uint8).view(format).double()
        numbers = bits[bits.isfinite()].unique()
        between = (numbers[1:] + numbers[:-1]) / 2
        for tensor in (drawn, drawn * 1e-30, torch.cat((numbers, between, between * (1 + 2.0**-40)))):
            assert torch.equal(rounded_to_float8(tensor, format), rounded(tensor, format))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_are_those_of_the_rounded_tensors(dtype: torch.dtype) -> None:
    x, weight, bias, grad = case(dtype)
    x8, weight8, grad8 = rounded(x, FORWARD_FORMAT), rounded(weight, FORWARD_FORMAT), rounded(grad, GRADIENT_FORMAT)
    product, grad_x = x8 @ weight8.t(), grad8 @ weight8
    grad_weight = grad8.flatten(0, 1).t() @ x8.flatten(0, 1)
    out, *found = gradients(x, weight, bias, grad)
    assert [tensor.dtype for tensor in (out, *found)] == [dtype] * 4
    # The terms are exact in fp32, and in float64 so are their sums. Fp32 sums of K terms are off by at most K
    # roundings of the sum of sizes; then there is one rounding to the dtype (and one where the bias is added).
    unit, unit32 = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2 if dtype != torch.float64 else 0
    sizes = (
        (x8.abs() @ weight8.abs().t(), IN),
        (grad8.abs() @ weight8.abs(), OUT),
        (grad8.abs().flatten(0, 1).t() @ x8.abs().flatten(0, 1), T),
    )
    wanted = (product + bias.double(), grad_x, grad_weight)
    for value, exact, (size, terms) in zip((out, *found[:2]), wanted, sizes, strict=True):
        bound = exact.abs() * unit + size * terms * unit32
        if value is out:
            bound = bound + (product.abs() + size * terms * unit32) * unit + bound * unit
        assert ((value.double() - exact).abs() <= bound).all()
    torch.testing.assert_close(found[2], grad.sum((0, 1)))


def test_rounding_keeps_what_the_formats_promise() -> None:
    """Relative errors of half a step, u / (1 + u) with u = 2^-4 for e4m3 and 2^-3 for e5m2, where values are not tiny
    beside the largest."""
    tensor = torch.randn(10_000, generator=torch.Generator().manual_seed(1)).clamp(min=1e-2)
    for format, bits in ((FORWARD_FORMAT, 4), (GRADIENT_FORMAT, 3)):
        found = quantize(tensor, scale_of(amax_of(tensor), format), format)
        back = found.values.float() * found.scale
        error = ((back - tensor).abs() / tensor).max()
        largest = 2.0**-bits / (1 + 2.0**-bits)
        assert 0.9 * largest < error <= largest * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_torchao_gives_the_same(dtype: torch.dtype, with_bias: bool) -> None:
    x, weight, bias, grad = case(dtype, seed=2)
    config = Float8LinearConfig(emulate=True, round_scales_to_power_of_2=True)
    linear = torch.nn.Linear(IN, OUT, bias=with_bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if with_bias:
            linear.bias.copy_(bias)
    theirs = Float8Linear.from_float(linear, config)
    x_theirs = x.clone().requires_grad_()
    out = theirs(x_theirs)
    out.backward(grad)
    found = gradients(x, weight, bias if with_bias else None, grad)
    assert x_theirs.grad is not None
    wanted = [out.detach(), x_theirs.grad, *(parameter.grad for parameter in linear.parameters())]
    # They dequantize, multiply and (bf16) round where we multiply, round and dequantize: all by powers of two.
    for ours, other in zip(found, wanted, strict=True):
        assert other is not None
        assert torch.equal(ours, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_is_the_smallest_power_of_two_that_fits(dtype: torch.dtype) -> None:
    for format in (FORWARD_FORMAT, GRADIENT_FORMAT):
        limit = torch.finfo(format).max
        amaxes = torch.cat([2.0 ** torch.arange(-80, 80), limit * 2.0 ** torch.arange(-80, 80), torch.rand(50) * 1e3])
        scales = scale_of(amaxes.to(dtype).float(), format).double()
        values = amaxes.to(dtype).double()
        assert torch.equal(scales.log2().frac(), torch.zeros_like(scales))
        assert (values / scales <= limit).all() and (values / scales > limit / 2).all()


def test_parts_of_a_gradient_may_have_scales_of_their_own() -> None:
    """Whatever the scale, e5m2 rounds alike what lies within 2^-29.8 (2^-14 / 57344) of the largest magnitude."""
    generator = torch.Generator().manual_seed(3)
    sizes = 2.0 ** -torch.linspace(0, 29, 1000)
    tensor = (torch.rand(1000, generator=generator) * 0.5 + 1.0) * sizes
    parts = tensor[torch.randperm(1000, generator=generator)].chunk(4)
    together = scale_of(amax_of(*parts), GRADIENT_FORMAT)
    for part in parts:
        whole, own = (quantize(part, s, GRADIENT_FORMAT) for s in (together, scale_of(amax_of(part), GRADIENT_FORMAT)))
        assert torch.equal(whole.values.float() * whole.scale, own.values.float() * own.scale)
    # The last part alone has no large number, and so another scale; one step below, its scale would matter.
    assert scale_of(amax_of(tensor[-10:]), GRADIENT_FORMAT) != together
    tiny = torch.tensor([1.25 * 2.0**-40])
    assert quantize(tiny, together, GRADIENT_FORMAT).values.float() == 0


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30])
def test_zeros_and_extremes_are_finite(size: float) -> None:
    x, weight, _, grad = case(torch.bfloat16)
    for out in gradients(x * size, weight, None, grad) + gradients(x, weight, None, grad * size):
        assert out.isfinite().all()
    if size == 0:
        assert not float8_linear(x * 0, weight).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["x", "weight", "grad"])
def test_what_is_not_finite_stays_visible(place: str, value: float) -> None:
    tensors = dict(zip(("x", "weight", "bias", "grad"), case(torch.bfloat16), strict=True))
    tensors[place].view(-1)[5] = value
    out, grad_x, grad_weight = gradients(tensors["x"], tensors["weight"], None, tensors["grad"])
    touched = {"x": (out, grad_weight), "weight": (out, grad_x), "grad": (grad_x, grad_weight)}[place]
    for result in touched:
        assert not result.isfinite().any()


def test_the_maximum_over_ranks_keeps_nan() -> None:
    """Some backends drop NaN from a maximum, so that it travels as infinity."""
    assert amax_of(torch.tensor([1.0, math.nan]), torch.tensor([2.0])) == math.inf
    assert amax_of(torch.tensor([1.0, -3.0]), torch.tensor([2.0])) == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_compiled_as_a_whole_it_gives_the_same(dtype: torch.dtype) -> None:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        return float8_linear(torch.nn.functional.silu(x), weight) * 2

    x, weight, _, grad = case(dtype)
    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = function(*leaves)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


def test_only_gradients_that_are_wanted_are_computed() -> None:
    x, weight, _, grad = case(torch.float32)
    weight.requires_grad_()
    float8_linear(x, weight).backward(grad)
    assert x.grad is None and weight.grad is not None
    x.requires_grad_()
    (alone,) = torch.autograd.grad(float8_linear(x, weight.detach()), x, grad)
    assert torch.equal(alone, gradients(x.detach(), weight.detach(), None, grad)[1])


def test_the_hardware_gets_operands_as_it_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for cuBLAS that refuses what it refuses: other orders in memory, other multiples, other scales."""
    calls = []

    def stand_in(
        a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype, use_fast_accum: bool
    ) -> Tensor:
        assert a.stride() == (a.shape[1], 1) and b.stride() == (1, b.shape[0])
        assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0
        assert {a.dtype, b.dtype} in ({FORWARD_FORMAT}, {FORWARD_FORMAT, GRADIENT_FORMAT})
        # An H200 with CUDA 13.0 refuses all other addresses with CUBLAS_STATUS_NOT_SUPPORTED.
        assert scale_a.data_ptr() % 16 == scale_b.data_ptr() % 16 == 0
        assert scale_a.numel() == scale_b.numel() == 1 and scale_a.dtype == scale_b.dtype == torch.float32
        calls.append((a.dtype, use_fast_accum))
        return ((a.double() * scale_a) @ (b.double() * scale_b)).to(out_dtype)

    x, weight, _, grad = case(torch.float64)
    emulated = gradients(x, weight, None, grad)
    monkeypatch.setattr(torch, "_scaled_mm", stand_in)
    monkeypatch.setattr(float8, "runs_on_hardware", lambda device: True)
    for ours, other in zip(gradients(x, weight, None, grad), emulated, strict=True):
        assert torch.equal(ours, other)
    assert calls == [(FORWARD_FORMAT, True), (GRADIENT_FORMAT, False), (GRADIENT_FORMAT, False)]


def test_torchs_own_float8_product_agrees() -> None:
    """torch._scaled_mm runs on CPU too, slowly: arguments and meaning of the scales are as we think."""
    x, weight, _, _ = case(torch.bfloat16)
    x8, weight8 = (quantize(t, scale_of(amax_of(t), FORWARD_FORMAT), FORWARD_FORMAT) for t in (x, weight))
    ours = scaled_product(x8.flat(), weight8.t(), torch.bfloat16, on_hardware=False)
    try:
        theirs = scaled_product(x8.flat(), weight8.t(), torch.bfloat16, on_hardware=True)
    except RuntimeError as error:
        if "could not create a primitive descriptor" not in str(error):
            raise
        pytest.skip("oneDNN has no float8 product for this CPU")
    # Each sums 64 exact terms in its own order in fp32, and then rounds to bf16: neighbours at most.
    torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=1e-5)
    assert isinstance(x8, Scaled)


def test_what_runs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "float8_linear" not in describe("cpu")
    assert describe("cpu", OpSettings(use_float8=True))["float8_linear"].implementation == "emulation"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for number, (capability, implementation, reason) in enumerate(
        (
            ((8, 0), "emulation", "NVIDIA A100 has compute capability 8.0, float8 needs 8.9"),
            ((8, 9), "torch._scaled_mm", "float8 matrix units"),
            ((10, 0), "torch._scaled_mm", "float8 matrix units"),
        )
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        choice = float8.choice(torch.device("cuda", number))
        assert choice.implementation == implementation and reason in choice.reason
    float8.why_not_on_hardware.cache_clear()
