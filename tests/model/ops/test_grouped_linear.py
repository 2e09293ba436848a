"""Linear layers of experts against a dense float64 sum over all experts, and against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internlm.model.ops import grouped_linear as module
from internlm.model.ops.cpu.gemm import choose_cpu_gemm
from internlm.model.ops.grouped_linear import choice, grouped_linear, input_gradient, weight_gradient
from internlm.model.recompute import SAVE_POLICIES, SavePolicy, recomputed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COUNTS = [(5, 0, 1, 40, 0), (0, 7, 0), (3,), (0, 0)]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _operands(counts: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows, weight and gradient."""
    num_rows, num_experts = sum(counts), len(counts)
    return [
        _random(num_rows, inputs, dtype=dtype),
        _random(num_experts, outputs, inputs, seed=1, dtype=dtype),
        _random(num_rows, outputs, seed=2, dtype=dtype),
    ]


def _results(call: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor, *rest: Any) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = call(x, weight, *rest)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]


def _dense(x: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Every expert on every row, with a mask: no slices, no order."""
    experts = [expert for expert, count in enumerate(counts) for _ in range(count)]
    mask = torch.eye(len(counts), dtype=x.dtype)[experts]
    return torch.einsum("mk,enk,me->mn", x, weight, mask)


@pytest.fixture(params=["loop", "grouped_mm"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The grouped GEMM exists on CPUs too, where the rule does not choose it."""
    if request.param == "grouped_mm":
        monkeypatch.setattr(
            module,
            "_is_looped",
            lambda rows, width: (
                rows.dtype == torch.float64 or any(own * rows.dtype.itemsize % 16 for own in (rows.shape[1], width))
            ),
        )
    name: str = request.param
    return name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(24, 40), (23, 37), (1, 1)], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_results_and_gradients(
    counts: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype, implementation: str
) -> None:
    x, weight, grad = _operands(counts, *widths, dtype)
    found = _results(grouped_linear, x, weight, grad, torch.tensor(counts))
    exact = _results(_dense, x.double(), weight.double(), grad.double(), counts)
    for own, other in zip(found, exact, strict=True):
        assert own.dtype == dtype and own.is_contiguous()
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(own.double(), other, rtol=rounding, atol=1e-14 if rounding < 1e-10 else 3e-5)
    empty = torch.tensor(counts) == 0
    assert torch.count_nonzero(found[2][empty]) == 0
    assert torch.equal(found[1], input_gradient(grad, weight, torch.tensor(counts)))
    assert torch.equal(found[2], weight_gradient(grad, x, torch.tensor(counts)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_implementations_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, grad = _operands((33, 0, 1, 64), 64, 48, dtype)
    counts = torch.tensor((33, 0, 1, 64))
    choose_cpu_gemm("dtype")
    try:
        looped = _results(grouped_linear, x, weight, grad, counts)
        monkeypatch.setattr(module, "_is_looped", lambda rows, width: False)
        assert all(map(torch.equal, looped, _results(grouped_linear, x, weight, grad, counts)))
    finally:
        choose_cpu_gemm("auto")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gemms_in_fp32_are_rounded_once(dtype: torch.dtype) -> None:
    """On CPUs without 16-bit units, as for other linear layers."""
    x, weight, grad = _operands((64, 0, 32), 40, 24, dtype)
    counts = (64, 0, 32)
    choose_cpu_gemm("fp32")
    try:
        found = _results(grouped_linear, x, weight, grad, torch.tensor(counts))
    finally:
        choose_cpu_gemm("auto")
    exact = _results(_dense, x.double(), weight.double(), grad.double(), counts)
    for own, other in zip(found, exact, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=0.51 * torch.finfo(dtype).eps, atol=3e-5)


def test_gradients_by_differences() -> None:
    counts = torch.tensor([2, 0, 3])
    x, weight = _random(5, 3).requires_grad_(), _random(3, 4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: grouped_linear(x, weight, counts), (x, weight))


def test_only_needed_gradients_are_computed() -> None:
    x, weight, grad = _operands((3, 2), 8, 8, torch.float32)
    for needs, operator in (
        (0, "internlm::grouped_linear_input_gradient"),
        (1, "internlm::grouped_linear_weight_gradient"),
    ):
        operands = [x.clone(), weight.clone()]
        operands[needs].requires_grad_()
        with _Operators() as run:
            grouped_linear(*operands, torch.tensor([3, 2])).backward(grad)
        assert [name for name in run.counts if "grouped" in name] == ["internlm::grouped_linear", operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_and_alignment(dtype: torch.dtype, implementation: str) -> None:
    """Columns of a wider matrix, weights within a flat buffer, one row of any stride, and expanded gradients."""
    counts = torch.tensor([4, 0, 3])
    x, weight, _ = _operands((4, 0, 3), 16, 8, dtype)
    wide_x = torch.full((7, 19), torch.nan, dtype=dtype)
    wide_x[:, 1:17] = x
    flat = torch.full((weight.numel() + 1,), torch.nan, dtype=dtype)
    flat[1:] = weight.flatten()
    views = wide_x[:, 1:17], flat[1:].view(weight.shape)
    by_columns = weight.transpose(1, 2).contiguous().transpose(1, 2)
    for grad in (
        torch.ones((), dtype=dtype).expand(7, 8),
        _random(8, dtype=dtype).expand(7, 8),
        _random(8, 7, dtype=dtype).t(),
    ):
        expected = _results(grouped_linear, x, weight, grad.contiguous(), counts)
        torch.testing.assert_close(_results(grouped_linear, *views, grad, counts), expected)
        torch.testing.assert_close(_results(grouped_linear, x, by_columns, grad, counts), expected)
    one = torch.tensor([0, 1, 0])
    expected = _results(grouped_linear, x[:1].clone(), weight, grad[:1].contiguous(), one)
    torch.testing.assert_close(_results(grouped_linear, wide_x[:1, 1:17], weight, grad[:1], one), expected)


def test_copies_are_made_only_where_needed() -> None:
    x, weight, _ = _operands((4, 0, 3), 16, 8, torch.bfloat16)
    for own in (x, weight, weight.transpose(1, 2), x[1:], weight[1:]):
        assert module.aligned(own).data_ptr() == own.data_ptr() and module.aligned(own).stride() == own.stride()


@pytest.mark.parametrize("counts", [[4, 0, 2], [4, 0, 4]])
def test_counts_that_do_not_add_up(counts: list[int]) -> None:
    x, weight, _ = _operands((4, 0, 3), 16, 8, torch.float32)
    with pytest.raises(ValueError, match=rf"counts \[4, 0, {counts[2]}\]: .* {sum(counts)} rows in all, .* are 7$"):
        grouped_linear(x, weight, torch.tensor(counts))


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


class _Lists:
    def put(self, tensor: Tensor) -> Any:
        return tensor.tolist(), tensor.dtype

    def get(self, stored: Any) -> Tensor:
        values, dtype = stored
        return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("store", [None, _Lists()], ids=["on the device", "in a store"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputation(dtype: torch.dtype, store: Any, implementation: str) -> None:
    """No policy changes a bit; "matmuls" does not run the GEMM again."""
    x, weight, grad = _operands((33, 0, 4), 24, 16, dtype)
    counts = torch.tensor((33, 0, 4))

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        return torch.sin(grouped_linear(torch.cos(x), weight, counts))

    expected = _results(layer, x, weight, grad)
    forward: dict[SavePolicy, int] = {}
    for policy in SAVE_POLICIES:
        with _Operators() as run:
            found = _results(recomputed(layer, policy, store), x, weight, grad)
        assert all(map(torch.equal, found, expected)), policy
        forward[policy] = run.counts["internlm::grouped_linear"]
        assert run.counts["internlm::grouped_linear_input_gradient"] == 1
        assert run.counts["internlm::grouped_linear_weight_gradient"] == 1
    assert forward == {"everything": 1, "matmuls": 1, "attention": 2, "nothing": 2}
    assert set(forward) == set(get_args(SavePolicy))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", SAVE_POLICIES)
def test_one_graph_when_compiled(policy: SavePolicy, dtype: torch.dtype, implementation: str) -> None:
    """Also for other numbers of rows, without compiling again."""

    def layer(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        return torch.sin(grouped_linear(torch.cos(x), weight, counts))

    torch._dynamo.reset()
    compiled = torch.compile(recomputed(layer, policy), fullgraph=True, backend="aot_eager", dynamic=True)
    for counts in ((3, 0, 6), (8, 2, 9), (0, 0, 33)):
        operands = _operands(counts, 16, 8, dtype)
        with torch.compiler.set_stance("default" if counts == (3, 0, 6) else "fail_on_recompile"):
            found = _results(compiled, *operands, torch.tensor(counts))
        assert all(map(torch.equal, found, _results(layer, *operands, torch.tensor(counts))))


def test_shapes_without_values() -> None:
    """What a compiler is told about the results is what the operators give."""
    x, weight, grad = _operands((3, 0, 6), 16, 8, torch.bfloat16)
    counts = torch.tensor([3, 0, 6])
    namespace = torch.ops.internlm
    for operator, operands in (
        (namespace.grouped_linear, (x.requires_grad_(), weight.requires_grad_(), counts)),
        (namespace.grouped_linear_input_gradient, (grad, weight, counts)),
        (namespace.grouped_linear_weight_gradient, (grad, x, counts)),
    ):
        tests = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(operator.default, operands, test_utils=tests)


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice(CPU, torch.float32).implementation == "a loop over the experts; PyTorch's GEMMs"
    looped = "a loop over the experts, which waits for the device"
    for capability, dtype, widths, reason in (
        ((9, 0), torch.bfloat16, (), None),
        ((9, 0), torch.bfloat16, (64, 24), None),
        ((10, 0), torch.bfloat16, (64, 24), None),
        ((9, 0), torch.bfloat16, (64, 20), "multiples of 8, not 20"),
        ((9, 0), torch.float16, (), "only bf16"),
        ((9, 0), torch.float32, (), "only bf16"),
        ((8, 0), torch.bfloat16, (), "capability 9 or 10"),
        (None, torch.bfloat16, (), "capability 9 or 10"),
    ):
        monkeypatch.setattr(module, "capability_of", lambda device, own=capability: own)
        found = choice(CUDA, dtype, widths)
        assert found.implementation == ("torch.nn.functional.grouped_mm" if reason is None else looped)
        assert reason is None or reason in found.reason


def test_empty_groups_on_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, grad = _operands((3, 0, 6), 16, 8, torch.bfloat16)
    monkeypatch.setattr(module, "_is_looped", lambda rows, width: False)
    monkeypatch.setattr(module, "capability_of", lambda device: (10, 0))
    grouped_mm = torch.nn.functional.grouped_mm

    def wrong(*operands: Tensor, offs: Tensor) -> Tensor:
        out = grouped_mm(*operands, offs=offs)
        out[1] = torch.nan
        return out

    counts = torch.tensor([3, 0, 6])
    expected = weight_gradient(grad, x, counts)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", wrong)
    assert torch.equal(weight_gradient(grad, x, counts), expected)
    assert torch.count_nonzero(expected[1]) == 0
