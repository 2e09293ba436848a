"""Masters and moments of one bucket's shard, and AdamW on any part of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.solver.optimizer.bucket import Bucket
from internlm.solver.optimizer.rounding_noise import RoundingNoise, store_cut


@dataclass(frozen=True)
class AdamStep:
    """What all shards have in common in one step.

    Attributes:
        lr, beta1, beta2, eps: of AdamW.
        divisor: scalar fp32; gradients are divided by it, which takes the loss scale away and clips.
        skipped: scalar fp32; with 1.0 nothing changes.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    divisor: Tensor
    skipped: Tensor


class Scratch:
    """Flat fp32 memory in which parts of shards are unpacked, shared by all buckets.

    Args:
        numel: elements of the largest part.
        device: where shards are updated.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._numel, self._device = numel, device

    def of(self, name: str, source: Tensor) -> Tensor:
        """A copy of `source` in fp32, until the next one of that name."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self._numel, dtype=torch.float32, device=self._device)
        return self._buffers[name][: source.numel()].copy_(source)


class ShardState:
    """The optimizer state of one bucket on this rank.

    Args:
        bucket: its `master` is a part of the state.
        weight_decay: of AdamW.
        scratch: for moments in bf16.
        noise: with which moments are rounded to bf16; whoever updates has drawn it for this update. None keeps the
            dtype of the master.

    Attributes:
        exp_avg, exp_avg_sq: first and second moment, flat, like `bucket.master`.
        num_updates: scalar fp32 beside the master: updates taken; skipped ones do not count.
    """

    def __init__(
        self,
        bucket: Bucket,
        weight_decay: float,
        scratch: Scratch,
        noise: RoundingNoise | None = None,
    ) -> None:
        self.bucket = bucket
        self.weight_decay = weight_decay
        dtype = bucket.master.dtype if noise is None else torch.bfloat16
        self.exp_avg = torch.zeros_like(bucket.master, dtype=dtype)
        self.exp_avg_sq = torch.zeros_like(bucket.master, dtype=dtype)
        self.num_updates = torch.zeros((), dtype=torch.float32, device=bucket.master.device)
        self._scratch = scratch
        self._noise = noise

    @property
    def moments(self) -> dict[str, Tensor]:
        """Both, under the names that they have in checkpoints."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def update(self, part: slice, gradient: Tensor, step: AdamStep) -> None:
        """Update one part; `num_updates` is left to the caller, when all parts are done.

        Args:
            part: elements of the shard, from a multiple of `ALIGNMENT` to another: the kernel's vector loops then begin
                and end as they would over the whole shard, so that parts change no bit.
            gradient: of the part, in the dtype of the master; is divided by `step.divisor` in place, unless the step is
                skipped.
            step: the same for all parts.
        """
        kept = {name: moment[part] for name, moment in self.moments.items()}
        moments = kept
        if self._noise is not None:
            moments = {name: self._scratch.of(name, moment) for name, moment in kept.items()}
        adamw(
            [self.bucket.master[part]],
            [gradient],
            [moments["exp_avg"]],
            [moments["exp_avg_sq"]],
            [],
            [self.num_updates.clone()],
            fused=True,
            # The kernel reads both on the device. It divides by the one, and leaves all as it is when the other is 1.
            grad_scale=step.divisor,
            found_inf=step.skipped,
            amsgrad=False,
            beta1=step.beta1,
            beta2=step.beta2,
            lr=step.lr,
            weight_decay=self.weight_decay,
            eps=step.eps,
            maximize=False,
        )
        if self._noise is not None:
            for name, moment in moments.items():
                self._add_noise(self._noise, name, part, moment)
                store_cut(kept[name], moment)

    def _add_noise(self, noise: RoundingNoise, name: str, part: slice, values: Tensor) -> None:
        for parameter, pieces in self.bucket.pieces(values.view(torch.int32), part.start):
            for box, piece in pieces:
                noise.add(piece, box, f"{name}/{shard_spec_of(parameter).name}")
