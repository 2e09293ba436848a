"""On a device: memory of a step is what the form says, and an offloaded state trains as one on the device."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import internlm.solver.optimizer.shard_updaters as updates
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.core.parallel.shard_spec import ShardSpec, attach_shard_spec
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LR = 1e-3
BF16 = torch.bfloat16
MIB = 2**20


def optimizer_of(shape: tuple[int, int], count: int, form: StateForm) -> HybridZeroOptimizer:
    """bf16 weights of one shape, in two buckets."""
    context = ParallelContext.create(device="cuda")
    weights = [nn.Parameter(torch.ones(shape, dtype=BF16, device=context.device)) for _ in range(count)]
    for number, weight in enumerate(weights):
        attach_shard_spec(weight, ShardSpec.whole(f"w{number}", weight.shape))
    bucket_size = shape[0] * shape[1] * -(-count // 2)
    return HybridZeroOptimizer(
        nn.ParameterList(weights), context, clip_grad_norm=1.0, reduce_bucket_size=bucket_size, form=form
    )


def take_step(optimizer: HybridZeroOptimizer, step: int) -> None:
    """Gradients from 1 to 2, of a sign that changes: of one near zero, AdamW makes much of the last bit."""
    generator = torch.Generator("cuda").manual_seed(step)
    optimizer.begin_step(1)
    for bucket in optimizer.buckets:
        for weight in reversed(bucket.parameters):
            size = 1 + torch.rand(weight.shape, generator=generator, dtype=BF16, device="cuda")
            deliver_gradient(weight, size if step % 3 else -size)
    optimizer.step(LR)


@pytest.mark.parametrize("is_offloaded", [False, True])
@pytest.mark.parametrize(
    ("gradients", "moments"), list(itertools.product((torch.float32, BF16), (torch.float32, BF16)))
)
def test_the_peak_of_a_step(gradients: torch.dtype, moments: torch.dtype, is_offloaded: bool) -> None:
    shape, count = (4096, 4096), 32
    numel = count * shape[0] * shape[1]
    state = numel * (2 + gradients.itemsize + (0 if is_offloaded else 4 + 2 * moments.itemsize))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = optimizer_of(shape, count, StateForm(gradients, moments, is_offloaded))
    # The weights of one bucket, half of all, are there twice while it is built.
    assert torch.cuda.max_memory_allocated() - before <= state + numel // 2 * 2 + 64 * MIB
    torch.cuda.reset_peak_memory_stats()
    for step in range(2):
        take_step(optimizer, step)
    peak = torch.cuda.max_memory_allocated() - before
    # Two gradients in bf16 of the test's making; three buffers of scratch and one of random numbers, of 64 MiB; norms
    # of rows of 1024, 20 bytes each.
    slack = 2 * 2 * shape[0] * shape[1] + 4 * 64 * MIB + numel // 1024 * 20 + 16 * MIB
    assert state <= peak <= state + slack
    # It would not hide another buffer: the smallest has 2 bytes an element.
    assert slack < 2 * numel


def weights_after(form: StateForm, num_steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Masters and weights, on the host."""
    optimizer = optimizer_of((512, 1000), 6, form)
    for step in range(num_steps):
        take_step(optimizer, step)
    optimizer.finish_gathering()
    return [bucket.master.cpu() for bucket in optimizer.buckets], [
        weight.detach().cpu() for bucket in optimizer.buckets for weight in bucket.parameters
    ]


@pytest.mark.parametrize("gradients", [torch.float32, BF16])
def test_an_offloaded_state_trains_as_one_on_the_device(gradients: torch.dtype) -> None:
    """The kernels may round differently: a few units of the last place of an update, and of a weight."""
    num_steps = 5
    masters, weights = weights_after(StateForm(gradients), num_steps)
    offloaded, leaving = weights_after(StateForm(gradients, is_offloaded=True), num_steps)
    # About ten operations of fp32 make an update of at most lr; weights near 1 are rounded up to three times.
    allowed = num_steps * (10 * 2**-24 * LR + 3 * 2**-24)
    for one, other in zip(masters, offloaded, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=allowed)
    for one, other in zip(weights, leaving, strict=True):
        # Neighbours in bf16 below 2, where the two masters lie on either side of a middle.
        torch.testing.assert_close(other, one, rtol=0, atol=2**-7)
        assert (other != one).float().mean() < 0.01


@pytest.mark.parametrize("gradients", [torch.float32, BF16])
def test_an_update_in_parts_is_that_of_the_whole(gradients: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    form = StateForm(gradients, BF16)
    whole = weights_after(form, 3)
    monkeypatch.setattr(updates, "part_size", lambda device: 2**16)
    for one, other in zip(whole, weights_after(form, 3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_resident_update_waits_for_nothing() -> None:
    """In any form on the device, after the first step, which finds out what is in use."""
    for gradients, moments in itertools.product((torch.float32, BF16), (torch.float32, BF16)):
        optimizer = optimizer_of((256, 256), 4, StateForm(gradients, moments))
        take_step(optimizer, 0)
        gradient = torch.ones(256, 256, dtype=BF16, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.begin_step(1)
            for bucket in optimizer.buckets:
                for weight in reversed(bucket.parameters):
                    deliver_gradient(weight, gradient)
            optimizer.step(LR)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_weights_are_the_rounding_of_offloaded_masters() -> None:
    """Bit for bit, after several steps whose copies overlap."""
    optimizer = optimizer_of((2048, 4096), 4, StateForm(BF16, is_offloaded=True))
    for step in range(3):
        take_step(optimizer, step)
    for bucket in optimizer.buckets:
        assert bucket.master.device.type == "cpu"
        for parameter, view in zip(bucket.parameters, bucket.views(bucket.master), strict=True):
            assert torch.equal(parameter.detach().cpu(), view.to(BF16))


def test_an_overflow_is_skipped_on_the_host() -> None:
    for form in (FP32_STATE, StateForm(is_offloaded=True)):
        optimizer = optimizer_of((64, 64), 2, form)
        take_step(optimizer, 0)
        before = [bucket.master.clone() for bucket in optimizer.buckets]
        optimizer.begin_step(1)
        for bucket in optimizer.buckets:
            for weight in bucket.parameters:
                deliver_gradient(weight, torch.full_like(weight, torch.inf, requires_grad=False))
        assert float(optimizer.step(LR).skipped) == 1.0
        assert optimizer.num_updates == 1
        for bucket, master in zip(optimizer.buckets, before, strict=True):
            assert torch.equal(bucket.master, master)
