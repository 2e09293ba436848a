"""Own Triton kernels of a step and of experts, in Triton's interpreter on a CPU, against PyTorch's operators.

The interpreter has no `tl.sum` once Triton was imported without it; that kernel is tested on GPUs alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.tiny import global_batch, tiny_engine
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from internlm.core.context.parallel_context import ParallelContext
from internlm.model.moe import expert_order
from internlm.solver.optimizer import bucket as buckets
from internlm.solver.optimizer import shard_updaters as updaters

KERNELS = ("internlm.solver.optimizer.triton_kernels", "internlm.model.moe.expert_order_kernels")


@pytest.fixture
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in KERNELS:
        sys.modules.pop(name, None)
    yield
    for name in KERNELS:
        sys.modules.pop(name, None)


def weights_after_training(**changes: Any) -> list[Tensor]:
    context = ParallelContext.create(device="cpu")
    engine = tiny_engine(context, weight_decay=0.1, reduce_bucket_size=3000, clip_grad_norm=0.5, **changes)
    for step in range(3):
        engine.train_step(global_batch(step, 4, 0, 1), 1e-3)
    gradients = [piece for *_, own in engine.optimizer.sharded_gradients() for _, piece in own]
    return [parameter.detach().clone() for parameter in engine.model.parameters()] + gradients


@pytest.mark.usefixtures("_interpreted")
def test_an_optimizer_that_works_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and clipped gradients are those of PyTorch's kernel, up to the rounding of an update."""
    expected = weights_after_training()
    built = []
    monkeypatch.setattr(updaters, "why_no_triton", lambda device: None)
    one_pass = updaters.OnePassUpdater
    monkeypatch.setattr(updaters, "OnePassUpdater", lambda *args: built.append(one_pass(*args)) or built[-1])
    found = weights_after_training()
    assert built
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_interpreted")
def test_gradients_are_accumulated_exactly() -> None:
    kernels = importlib.import_module(KERNELS[0])
    for dtype in (torch.bfloat16, torch.float16):
        for numel in (0, 1, 1024, 3001):
            target, source = torch.randn(numel), torch.randn(numel).to(dtype)
            total = target + source
            kernels.accumulate(target, source, adds=True)
            assert torch.equal(target, total)
            kernels.accumulate(target, source, adds=False)
            assert torch.equal(target, source.float())


@pytest.mark.parametrize(
    ("device", "rows", "dtype", "is_contiguous", "expected"),
    [
        ("cuda", 2**10, torch.bfloat16, True, True),
        ("cpu", 2**10, torch.bfloat16, True, False),
        ("cuda", 2**10 - 1, torch.bfloat16, True, False),
        ("cuda", 2**10, torch.float32, True, False),
        ("cuda", 2**10, torch.float64, True, False),
        ("cuda", 2**10, torch.bfloat16, False, False),
    ],
)
def test_large_gradients_of_another_dtype_on_a_gpu_go_to_the_kernel(
    device: str, rows: int, dtype: torch.dtype, is_contiguous: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "why_no_triton", lambda device: None)
    with FakeTensorMode():
        view, gradient = torch.zeros(rows, 2**10, device=device), torch.zeros(rows, 2**10, dtype=dtype, device=device)
        assert buckets._is_accumulated_by_kernel(view, gradient if is_contiguous else gradient.t()) == expected


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(("num_tokens", "top_k", "width"), [(0, 2, 8), (5, 1, 8), (9, 3, 1500)])
def test_sums_over_experts(num_tokens: int, top_k: int, width: int) -> None:
    kernels = importlib.import_module(KERNELS[1])
    experts = torch.rand(num_tokens, 6).argsort(dim=1)[:, :top_k]
    order = expert_order.ExpertOrder.of(experts, 6)
    y, weights = torch.randn(num_tokens * top_k, width), torch.rand(num_tokens, top_k)
    rows = order.inverse.view(-1, top_k)
    torch.testing.assert_close(kernels.sum_rows(y, rows, None), expert_order._summed(y, rows))
    torch.testing.assert_close(
        kernels.sum_rows(y, rows, weights), expert_order._combine(y, weights, order.order, order.inverse)
    )
