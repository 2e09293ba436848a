"""How a CPU multiplies 16-bit matrices: the rule on its features, and products in fp32 that are rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internlm.model.ops import linear
from internlm.model.ops.attention import causal_attention as attention_module
from internlm.model.ops.cpu.attention import cpu_attention
from internlm.model.ops.cpu.gemm import CpuFeatures, choose_cpu_gemm, features_in, gemm, rule
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.ops.implementations import describe
from internlm.model.ops.self_test import self_tests
from internlm.model.recompute import SavePolicy, recomputed

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def in_fp32() -> Iterator[None]:
    choose_cpu_gemm("fp32")
    yield
    choose_cpu_gemm("auto")


@pytest.mark.parametrize(
    ("vendor", "flags", "bf16", "fp16"),
    [
        # Each line is a kind of CPU that is in use.
        pytest.param("GenuineIntel", "avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16", "dtype", "dtype", id="AMX"),
        pytest.param("GenuineIntel", "avx512f avx512_bf16 avx512_fp16", "fp32", "dtype", id="AMX hidden from a VM"),
        pytest.param("GenuineIntel", "avx512f avx512_bf16", "fp32", "fp32", id="Cooper Lake"),
        pytest.param("GenuineIntel", "avx2 avx512f", "fp32", "fp32", id="AVX512 alone"),
        pytest.param("AuthenticAMD", "avx512f avx512_bf16", "dtype", "fp32", id="Zen 4 and 5"),
        pytest.param("AuthenticAMD", "avx2 fma", "fp32", "fp32", id="AVX2 alone"),
        pytest.param("", "", "dtype", "dtype", id="no /proc/cpuinfo"),
    ],
)
def test_the_rule(vendor: str, flags: str, bf16: str, fp16: str) -> None:
    features = CpuFeatures("x86_64", vendor, frozenset(flags.split()))
    assert rule(features, torch.bfloat16).implementation == bf16
    assert rule(features, torch.float16).implementation == fp16
    assert rule(features, torch.float32).implementation == "dtype"
    assert rule(features, torch.float64).implementation == "dtype"


def test_other_architectures_are_left_alone() -> None:
    features = CpuFeatures("aarch64", "", frozenset({"bf16", "i8mm"}))
    assert {rule(features, dtype).implementation for dtype in DTYPES} == {"dtype"}


def test_features_are_read_from_cpuinfo() -> None:
    one = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16\n"
    expected = CpuFeatures("x86_64", "AuthenticAMD", frozenset({"fpu", "avx512f", "avx512_bf16"}))
    assert features_in(one + "\n" + one.replace("AMD", "???"), "x86_64") == expected
    assert features_in("", "arm64") == CpuFeatures("arm64", "", frozenset())


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _exactly(wide: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """One rounding to the dtype and the error of sums in fp32, of a few thousand numbers of size 1."""
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(wide.double(), exact, rtol=half * 1.01, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True])
# The last one is more than a block.
@pytest.mark.parametrize("shape", [(32, 1, 1), (33, 0, 5), (40, 70, 130), (40, 9000, 190)])
def test_products_are_rounded_once(
    dtype: torch.dtype, turned: bool, shape: tuple[int, int, int], in_fp32: None
) -> None:
    rows, inner, columns = shape
    a, b = _random(rows, inner).to(dtype), _random(inner, columns, seed=1).to(dtype)
    if turned:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    ours = gemm(a, b)
    assert ours.dtype == dtype and ours.is_contiguous()
    _exactly(ours, a.double() @ b.double(), dtype)
    assert torch.equal(ours, gemm(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_layers(dtype: torch.dtype, in_fp32: None) -> None:
    x, weight, bias = (x.to(dtype).requires_grad_() for x in (_random(2, 40, 70), _random(60, 70), _random(60)))
    grad = _random(2, 40, 60, seed=3).to(dtype)
    out = linear.linear(x, weight, bias)
    out.backward(grad)
    wide_x, wide_weight, wide_grad = x.detach().double(), weight.detach().double(), grad.double()
    _exactly(out.detach(), wide_x @ wide_weight.t() + bias.detach().double(), dtype)
    assert x.grad is not None and weight.grad is not None
    _exactly(x.grad, wide_grad @ wide_weight, dtype)
    _exactly(weight.grad, wide_grad.flatten(0, 1).t() @ wide_x.flatten(0, 1), dtype)


def test_few_rows_stay_as_they_are(in_fp32: None) -> None:
    x, weight = _random(4, 70).bfloat16(), _random(60, 70).bfloat16()
    assert torch.equal(linear.linear(x, weight, None), torch.nn.functional.linear(x, weight))


def test_every_op_is_right(in_fp32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "has_native_ops", lambda: False)
    choices = describe(CPU)
    assert choices["linear"].implementation == "PyTorch's GEMMs in fp32, block by block, rounded once"
    assert choices["linear"].reason == "model.cpu_gemm = 'fp32'"
    assert choices["attention"].implementation == "SDPA in fp32, one call per document length"
    outcomes = [one for one in self_tests(CPU) if one.dtype == torch.bfloat16]
    assert len(outcomes) > 10
    assert not [one for one in outcomes if one.problem]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 20])
def test_attention_in_fp32_rounds_once(dtype: torch.dtype, window: int | None) -> None:
    bounds = torch.tensor([0, 50, 120], dtype=torch.int32)
    inputs = [_random(1, 120, heads, 16, seed=heads).to(dtype) for heads in (4, 2, 2)]
    grad = _random(1, 120, 4, 16, seed=9).to(dtype)
    results = []
    for kernel, own in (("wide", inputs), ("flash", [x.double() for x in inputs])):
        leaves = [x.clone().requires_grad_() for x in own]
        out = cpu_attention(*leaves, bounds, window=window, scale=None, kernel=kernel)  # type: ignore[arg-type]
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    for ours, exact in zip(*results, strict=True):
        # The backward pass reads the result rounded, as every flash attention does.
        torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(dtype).eps, atol=0.01)


def _loss_and_gradients(dtype: torch.dtype) -> list[Tensor]:
    leaves = [_random(50, 40).bfloat16(), _random(70, 40, seed=1).bfloat16()]
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    out = linear_cross_entropy(*leaves, torch.arange(50), chunk_tokens=32)
    return [out.loss_sum.detach().double(), *(x.double() for x in torch.autograd.grad(out.loss_sum, leaves))]


def test_the_loss() -> None:
    """It is as near to float64 as with products of bf16, which round logits and gradients at the same places."""
    exact, plain = _loss_and_gradients(torch.float64), _loss_and_gradients(torch.bfloat16)
    choose_cpu_gemm("fp32")
    try:
        ours = _loss_and_gradients(torch.bfloat16)
    finally:
        choose_cpu_gemm("auto")
    for mine, its, truth in zip(ours, plain, exact, strict=True):
        assert (mine - truth).norm() <= 1.05 * (its - truth).norm() + 1e-6 * truth.norm()


def test_recomputation_keeps_the_rounded_product(in_fp32: None) -> None:
    """The policy "matmuls" neither multiplies again nor keeps fp32."""
    x, weight = _random(40, 64).bfloat16().requires_grad_(), _random(48, 64).bfloat16().requires_grad_()
    counts: dict[str, int] = {}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[keep] += func.name() == "internlm::fp32_gemm"
            return func(*args, **(kwargs or {}))

    for keep in get_args(SavePolicy):
        counts[keep] = 0
        with Counter():
            recomputed(lambda x: linear.linear(x, weight, None).sin(), keep)(x).sum().backward()
    # One forward and two backward; where nothing is kept, forward once more.
    assert counts == {"everything": 3, "matmuls": 3, "attention": 4, "nothing": 4}


def test_one_graph_when_compiled(in_fp32: None) -> None:
    x, weight = _random(40, 64).bfloat16().requires_grad_(), _random(48, 64, seed=1).bfloat16().requires_grad_()

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return linear.linear(a, b, None).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(x, weight), (x, weight))
    assert all(
        torch.equal(*pair) for pair in zip(grads, torch.autograd.grad(loss(x, weight), (x, weight)), strict=True)
    )
