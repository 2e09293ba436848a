"""The optimizer state of one bucket's shard, and its update, part by part."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.solver.optimizer.bucket import Bucket
from internlm.solver.optimizer.rules.update_rule import RoundingUpdateRule, UpdateRule, UpdateStep
from internlm.solver.optimizer.stochastic_rounding import StochasticRounding, store_truncated


class Scratch:
    """Flat fp32 memory into which parts of shards are converted, shared by all buckets.

    Args:
        numel: elements of the largest part.
        device: where shards are updated.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._numel, self._device = numel, device

    def fp32_copy(self, name: str, source: Tensor) -> Tensor:
        """Copy `source` to fp32; valid until the next copy of the same name."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._numel, dtype=torch.float32, device=self._device)
        return self._buffers[name][: source.numel()].copy_(source)


class ShardState:
    """The optimizer state of one bucket on this rank.

    Args:
        bucket: the bucket, whose `master` is part of the state.
        rule: see `UpdateRule`.
        scratch: memory for fp32 copies of bf16 state.
        rounding: rounds the state to bf16, with random numbers drawn for this update; None keeps the master's dtype.

    Attributes:
        tensors: name of `rule.state_names` -> flat tensor, like `bucket.master`.
    """

    def __init__(
        self,
        bucket: Bucket,
        rule: UpdateRule,
        scratch: Scratch,
        rounding: StochasticRounding | None = None,
    ) -> None:
        self.bucket = bucket
        self.rule = rule
        dtype = bucket.master.dtype if rounding is None else torch.bfloat16
        self.tensors = {name: torch.zeros_like(bucket.master, dtype=dtype) for name in rule.state_names}
        self._scratch = scratch
        self._rounding = rounding

    def update(self, part: slice, gradient: Tensor, step: UpdateStep) -> None:
        """Update the masters and the state of one part.

        Args:
            part: range of the shard between multiples of `ALIGNMENT`: vectorized loops then start and end as they would
                over the whole shard, so the division into parts changes no bit.
            gradient: of the part, in the dtype of the master; divided by `step.divisor` in place, unless the step is
                skipped.
            step: the same for all parts.
        """
        stored = {name: tensor[part] for name, tensor in self.tensors.items()}
        state = stored
        if self._rounding is not None:
            state = {name: self._scratch.fp32_copy(name, tensor) for name, tensor in stored.items()}
        self.rule.update(self.bucket.master[part], gradient, state, self._of_group(step))
        if self._rounding is not None:
            for name, tensor in state.items():
                self._round(self._rounding, name, part, tensor)
                store_truncated(stored[name], tensor)

    def update_and_round(self, part: slice, step: UpdateStep) -> None:
        """`update` in one pass that also writes the parameters, by a `RoundingUpdateRule` and with an fp32 state.

        The gradients of the bucket are unchanged.
        """
        bucket, rule = self.bucket, self.rule
        assert isinstance(rule, RoundingUpdateRule) and self._rounding is None
        rounded = bucket.flat_parameters(part)
        rule.update_and_round(
            bucket.master[part],
            bucket.grad_shard[part],
            {name: tensor[part] for name, tensor in self.tensors.items()},
            self._of_group(step),
            rounded,
        )
        if rounded is None:
            bucket.write_back(part, bucket.master[part])

    def _of_group(self, step: UpdateStep) -> UpdateStep:
        """The step with the hyper-parameters of this bucket's parameter group."""
        options, shared = self.bucket.kind.options, step.hyper_parameters
        own = {"lr": shared["lr"] * options.lr_factor, "weight_decay": options.weight_decay}
        return replace(step, hyper_parameters={**shared, **own})

    def _round(self, rounding: StochasticRounding, name: str, part: slice, values: Tensor) -> None:
        for parameter, pieces in self.bucket.pieces(values.view(torch.int32), part.start):
            for box, piece in pieces:
                rounding.add(piece, box, f"{name}/{shard_spec_of(parameter).name}")
