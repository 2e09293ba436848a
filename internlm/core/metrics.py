"""What one optimizer step tells the hooks.

Values that live on the device stay there until somebody asks for numbers: `StepMetrics.numbers()` is the one place
that waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class StepMetrics:
    """The result of one optimizer step, equal on every data rank.

    Attributes:
        step: 1 for the first optimizer step of a run.
        loss: scalar fp32 tensor, mean over all valid tokens of the global batch.
        grad_norm: scalar fp32 tensor, global L2 norm before clipping (of the mean loss's gradient, loss scale removed).
        skipped: scalar fp32 tensor, 1.0 when the update was skipped for an inf or NaN gradient.
        lr: learning rate of this step.
        adam_beta2: second AdamW coefficient of this step.
        loss_scale: scalar fp32 tensor.
        num_valid_tokens: scalar tensor, tokens of the global batch that contribute loss.
        num_tokens: tokens of the global batch, padding included.
        num_samples: samples of the global batch.
        micro_num: micro batches of this step on each data rank.
        largest_length: tokens of the longest document (attention segment) among this rank's micro batches.
        largest_batch, smallest_batch: most and fewest documents in one of this rank's micro batches.
        num_consumed_tokens: tokens since the start of the run, this step included.
        num_consumed_samples: samples since the start of the run, this step included.
        inf_nan_skip_batches: scalar tensor, updates skipped since the start of the run.
        seconds: host time of this step by phase: "data" (waiting for the batch), "forward_backward", "optimizer", and
            "total" from the start of the step to the end of the update, without the hooks that follow.
        extra: further scalar tensors, each already reduced over the global batch: "acc", "perplexity",
            "loss/<type>", "acc/<type>", "tokens/<type>", ...
    """

    step: int
    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    lr: float
    adam_beta2: float
    loss_scale: Tensor
    num_valid_tokens: Tensor
    num_tokens: int
    num_samples: int
    micro_num: int
    largest_length: int
    largest_batch: int
    smallest_batch: int
    num_consumed_tokens: int
    num_consumed_samples: int
    inf_nan_skip_batches: Tensor
    seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """All values as Python numbers, with a single wait for the device. Names are those of the log line."""
        tensors = {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "skipped": self.skipped,
            "loss_scale": self.loss_scale,
            "valid_tokens": self.num_valid_tokens,
            "inf_nan_skip_batches": self.inf_nan_skip_batches,
            **self.extra,
        }
        values = torch.stack([tensor.detach().double().reshape(()) for tensor in tensors.values()]).tolist()
        numbers: dict[str, float] = {"step": self.step, **dict(zip(tensors, values, strict=True))}
        numbers.update(
            lr=self.lr,
            adam_beta2=self.adam_beta2,
            num_tokens=self.num_tokens,
            num_samples_in_batch=self.num_samples,
            micro_num=self.micro_num,
            largest_length=self.largest_length,
            largest_batch=self.largest_batch,
            smallest_batch=self.smallest_batch,
            num_consumed_tokens=self.num_consumed_tokens,
            num_consumed_samples=self.num_consumed_samples,
            **{f"{phase}_time": seconds for phase, seconds in self.seconds.items()},
        )
        return numbers
