"""Float8 on a GPU: its matrix units against the emulation, and a training step through them."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import global_batch, tiny_config, tiny_engine
from torch import Tensor

from internlm.core.compilation.compile_layers import compile_layers
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.core.parallel.parallelize import parallelize
from internlm.model.ops.float8.grouped_gemm import Implementation
from internlm.model.ops.float8.grouped_gemm import implementation as implementation_of
from internlm.model.ops.float8.grouped_linear import float8_grouped_linear
from internlm.model.ops.float8.linear import float8_linear
from internlm.model.ops.float8.scaled_gemm import choice, runs_on_hardware
from internlm.model.ops.implementations import OpSettings
from internlm.model.ops.self_test import float8_cases, float8_grouped_cases, judge, self_tests
from internlm.model.registry import build_model

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not runs_on_hardware(torch.device("cuda", 0)),
    reason="needs a GPU with float8 matrix units",
)


def test_what_doctor_runs() -> None:
    """Rounding is exact; products are as those of the rounded numbers in bf16."""
    outcomes = [one for one in self_tests(torch.device("cuda", 0), OpSettings(use_float8=True)) if "float8" in one.op]
    assert outcomes and [one for one in outcomes if one.problem is not None] == []


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(8, 48, 16), (64, 272, 1040)])
def test_more_shapes_of_what_doctor_runs(tokens: int, inputs: int, outputs: int) -> None:
    device = torch.device("cuda", 0)
    for case in float8_cases(device, tokens, inputs, outputs):
        assert judge(case, device, torch.bfloat16) is None, case.name


def gradients(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, *, on_hardware: bool) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    out = float8_linear(*leaves, on_hardware=on_hardware)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(64, 128, 256), (16, 16, 16), (4096, 512, 1536)])
def test_matrix_units_equal_the_emulation(tokens: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs) * 0.02
    tensors = [t.cuda().bfloat16() for t in (x, weight, torch.randn(outputs), torch.randn(tokens, outputs) * 1e-5)]
    found, wanted = (gradients(*tensors, on_hardware=on) for on in (True, False))
    # Both round exact products to bf16 (2^-9, twice where a bias is added). Fast accumulation of outputs keeps about
    # 13 bits between partial sums: 2^-13 of the sum of sizes, some 2^-13 * sqrt(K) of a sum of either sign.
    for one, other in zip(found, wanted, strict=True):
        error = float((one.float() - other.float()).norm() / other.float().norm())
        assert error < 2.0**-8 + 2.0**-13 * max(tokens, inputs, outputs) ** 0.5


def test_what_is_not_finite_stays_visible() -> None:
    x = torch.randn(32, 64, device="cuda").bfloat16()
    x[3, 5] = torch.inf
    assert not float8_linear(x, torch.randn(48, 64, device="cuda").bfloat16()).isfinite().any()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"postpone_weight_gradients": True, "compile_casts": True}])
def test_training_steps(compiled: bool, options: dict[str, bool]) -> None:
    """The loss falls as it does without float8.

    With this learning rate ten steps of the emulation on a CPU are within 0.2 % of those in bf16; with ten times of it
    the loss jumps up and down, and any rounding makes 15 %.
    """
    assert choice(torch.device("cuda", 0)).implementation == "torch._scaled_mm"
    losses = []
    for layers in (range(0), range(1, 3)):
        context = ParallelContext.create(ParallelLayout(), torch.device("cuda", 0))
        config = tiny_config(hidden_size=128, num_layers=4, intermediate_size=256, dtype="torch.bfloat16")
        with torch.device("meta"):
            model = build_model("INTERNLM2", config)
        parallelize(model, context, seed=7, options=ParallelOptions(float8_layers=layers, **options))
        if compiled:
            compile_layers(model)
        engine = tiny_engine(context, model=model, clip_grad_norm=0.5)
        # 32 tokens: the product of a weight's gradient needs a multiple of 16.
        batch = global_batch(0, 4, lengths=(7, 1, 12, 12))
        micros = [micro.to(context.device) for micro in batch.micro_batches]
        batch = type(batch)(micros, batch.num_samples)
        losses.append([float(engine.train_step(batch, 1e-3).loss) for _ in range(10)])
        context.close()
    plain, float8 = losses
    assert float8[-1] < 0.5 * float8[0]
    assert float8 == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("counts", [(37, 0, 1, 90, 0), (0, 700, 16, 1), (1,) * 64], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 64), (272, 1040)])
def test_experts_are_as_doctor_wants_them(counts: tuple[int, ...], inputs: int, outputs: int) -> None:
    device = torch.device("cuda", 0)
    for case in float8_grouped_cases(device, counts, inputs, outputs):
        assert judge(case, device, torch.bfloat16) is None, case.name


@pytest.mark.parametrize("kind", ["loop", "emulation"])
def test_implementations_of_experts_agree(kind: Implementation) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([100, 0, 3, 409], device="cuda")
    x, weight, grad = (
        torch.randn(shape, device="cuda").bfloat16() for shape in ((512, 128), (4, 256, 128), (512, 256))
    )
    results = []
    for implementation in (None, kind):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = float8_grouped_linear(*leaves, counts, implementation=implementation)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    # As in `test_matrix_units_equal_the_emulation`.
    for one, other in zip(*results, strict=True):
        error = float((one.float() - other.float()).norm() / other.float().norm())
        assert error < 2.0**-8 + 2.0**-13 * 512**0.5


def test_experts_on_hopper_do_not_wait() -> None:
    if implementation_of(torch.device("cuda", 0)) != "grouped":
        pytest.skip("needs compute capability 9: others loop over the experts")
    counts = torch.tensor([100, 0, 3, 409], device="cuda")
    x = torch.randn(512, 128, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(4, 256, 128, device="cuda").bfloat16().requires_grad_()
    float8_grouped_linear(x, weight, counts).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        float8_grouped_linear(x, weight, counts).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
