"""Updates the shards of all buckets, on the device or on the host; part by part if a dtype is converted.

The division into parts changes no bit of the result, and no whole buffer exists in two dtypes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from internlm.solver.optimizer.bucket import Bucket, part_size
from internlm.solver.optimizer.rules.update_rule import RoundingUpdateRule, UpdateRule, UpdateStep
from internlm.solver.optimizer.shard_state import Scratch, ShardState
from internlm.solver.optimizer.state_form import StateForm, master_dtype
from internlm.solver.optimizer.stochastic_rounding import StochasticRounding
from internlm.utils.copy_stream import CopyStream, QueuedCopy, copy_stream_of
from internlm.utils.triton_support import why_no_triton

Parts = Sequence[tuple[ShardState, Sequence[slice]]]
"""For every bucket, the parts of its shard to update in a step; see `ShardState.update`."""


class Updater(Protocol):
    """Updates masters and moments from the gradients of a step, and the parameters from the masters."""

    def run(self, parts: Parts, step: UpdateStep) -> None:
        """Update, and count the update in `step.num_updates`.

        Afterwards the device's current stream may read the parameters.
        """

    def divides(self, gradients: torch.dtype) -> bool:
        """Whether a step that is not skipped divides gradients of this dtype by `UpdateStep.divisor` in place."""


class ResidentUpdater:
    """Updates on the device of the parameters. Nothing waits for the device.

    Args:
        scratch: memory for fp32 copies of gradients in another dtype than the masters.
        rounding: that of the states.
        part_numel: number of elements in a part; None for whole shards, if no dtype is converted.
    """

    def __init__(self, scratch: Scratch, rounding: StochasticRounding | None, part_numel: int | None) -> None:
        self._scratch = scratch
        self._rounding = rounding
        self._part_numel = part_numel

    def run(self, parts: Parts, step: UpdateStep) -> None:
        """Update part by part."""
        if self._rounding is not None:
            self._rounding.draw(step.num_updates)
        for state, part in _cut(parts, self._part_numel):
            gradient = state.bucket.grad_shard[part]
            if gradient.dtype != state.bucket.master.dtype:
                gradient = self._scratch.fp32_copy("gradient", gradient)
            state.update(part, gradient, step)
            state.bucket.write_back(part, state.bucket.master[part])
        step.num_updates.add_(1.0 - step.skipped)

    def divides(self, gradients: torch.dtype) -> bool:
        """True for gradients that are updated without a copy."""
        return gradients == master_dtype(gradients)


class OnePassUpdater:
    """Updates on the GPU of the parameters by a `RoundingUpdateRule`, in one pass. Nothing waits for the device."""

    def run(self, parts: Parts, step: UpdateStep) -> None:
        """Update shard by shard."""
        for state, part in _cut(parts, None):
            state.update_and_round(part, step)
        step.num_updates.add_(1.0 - step.skipped)

    def divides(self, gradients: torch.dtype) -> bool:
        """False: gradients are unchanged."""
        return False


class OffloadedUpdater:
    """Updates on the host, where masters and state are; gradients and parameters are copied in their own dtypes.

    While the CPU updates one part, the gradients of the next and the parameters of the previous part are copied. The
    host waits for the gradients, which are copied once the global norm is known. Pinned memory contains only data in
    transit: two parts in each direction.

    Args:
        scratch: host memory for fp32 copies of gradients in another dtype.
        rounding: that of the states.
        down: copy stream from the device.
        up: copy stream to the device.
        part_numel: number of elements in a part.
        itemsize: bytes of the widest element of a gradient or a master.
    """

    def __init__(
        self,
        scratch: Scratch,
        rounding: StochasticRounding | None,
        down: CopyStream,
        up: CopyStream,
        part_numel: int,
        itemsize: int,
    ) -> None:
        self._scratch = scratch
        self._rounding = rounding
        self._down, self._up = down, up
        self._part_numel = part_numel
        num_bytes = 2 * part_numel * itemsize
        self._arrived = down.new_host_buffer(num_bytes, torch.uint8).view(2, -1)
        self._leaving = up.new_host_buffer(num_bytes, torch.uint8).view(2, -1)

    def run(self, parts: Parts, step: UpdateStep) -> None:
        """Update part by part."""
        step = replace(step, divisor=step.divisor.cpu(), skipped=step.skipped.cpu())
        if step.skipped:
            return
        if self._rounding is not None:
            self._rounding.draw(step.num_updates)
        self._down.wait_for_compute()
        self._up.wait_for_compute()
        work = list(_cut(parts, self._part_numel))
        arriving = [self._fetch(*work[0], slot=0)] if work else []
        left: list[QueuedCopy[None] | None] = [None, None]
        for number, (state, part) in enumerate(work):
            slot = number % 2
            if number + 1 < len(work):
                arriving.append(self._fetch(*work[number + 1], slot=1 - slot))
            gradient = arriving[number].synchronize()
            if gradient.dtype != state.bucket.master.dtype:
                gradient = self._scratch.fp32_copy("gradient", gradient)
            state.update(part, gradient, step)
            # The copy of the part before the previous one may still read this slot.
            if (copy := left[slot]) is not None:
                copy.synchronize()
            leaving = _typed(self._leaving[slot], state.bucket.kind.dtype, part).copy_(state.bucket.master[part])
            left[slot] = self._up.run(partial(state.bucket.write_back, part, leaving))
        step.num_updates.add_(1.0)
        self._up.join()

    def divides(self, gradients: torch.dtype) -> bool:
        """False: gradients on the device are unchanged."""
        return False

    def _fetch(self, state: ShardState, part: slice, slot: int) -> QueuedCopy[Tensor]:
        """Queue the copy of a part's gradients to the host."""
        source = state.bucket.grad_shard[part]
        target = _typed(self._arrived[slot], source.dtype, part)
        return self._down.run(partial(target.copy_, source, non_blocking=True))


def _works_in_one_pass(buckets: Sequence[Bucket], form: StateForm, rule: UpdateRule, device: torch.device) -> bool:
    """Whether the shards can be updated by `OnePassUpdater`."""
    return (
        isinstance(rule, RoundingUpdateRule)
        and form.moments == torch.float32
        and all(bucket.master.dtype == torch.float32 for bucket in buckets)
        and why_no_triton(device) is None
    )


def build_states(
    buckets: Sequence[Bucket], form: StateForm, rule: UpdateRule, device: torch.device
) -> tuple[list[ShardState], Tensor, Updater]:
    """The state of every bucket, the number of updates (scalar fp32, on the device of the state), and the updater.

    Args:
        buckets: buckets of the optimizer, built with the same form; empty if all weights of a pipeline stage are
            frozen.
        form: dtypes and device of the state.
        rule: an update rule on elements.
        device: device of the parameters.
    """
    state_device = form.state_device(device)
    numel = max((bucket.grad_shard.numel() for bucket in buckets), default=1)
    part_numel = min(numel, part_size(state_device))
    scratch = Scratch(part_numel, state_device)
    num_updates = torch.zeros((), dtype=torch.float32, device=state_device)
    rounding = None
    if form.moments != torch.float32:
        rounding = StochasticRounding([spec.global_shape for bucket in buckets for spec in bucket.specs], state_device)
    states = [ShardState(bucket, rule, scratch, rounding) for bucket in buckets]
    updater: Updater
    if form.is_offloaded:
        down, up = copy_stream_of(device), copy_stream_of(device)
        dtypes = {dtype for bucket in buckets for dtype in (bucket.grad_shard.dtype, bucket.master.dtype)}
        itemsize = max((dtype.itemsize for dtype in dtypes), default=0)
        updater = OffloadedUpdater(scratch, rounding, down, up, part_numel, itemsize)
    elif _works_in_one_pass(buckets, form, rule, device):
        updater = OnePassUpdater()
    else:
        is_converted = rounding is not None or any(b.grad_buffer.dtype != b.master.dtype for b in buckets)
        updater = ResidentUpdater(scratch, rounding, part_numel if is_converted else None)
    return states, num_updates, updater


def _cut(parts: Parts, part_numel: int | None) -> Iterator[tuple[ShardState, slice]]:
    for state, slices in parts:
        for whole in slices:
            size = part_numel or whole.stop - whole.start
            for start in range(whole.start, whole.stop, size):
                yield state, slice(start, min(start + size, whole.stop))


def _typed(memory: Tensor, dtype: torch.dtype, part: slice) -> Tensor:
    return memory[: (part.stop - part.start) * dtype.itemsize].view(dtype)
