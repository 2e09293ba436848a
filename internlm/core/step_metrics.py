"""Metrics of one optimizer step, as passed to the hooks.

Values stay on the device until `StepMetrics.numbers()` waits for them; nothing else here does. A caller that needs them
one step later calls `start_copy` first, so that the copy overlaps the next step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LOGGED = {"lr": "lr", "beta2": "adam_beta2"}
"""Hyper-parameters that are logged, and their names in the log, which are InternEvo's."""


@dataclass
class StepMetrics:
    """The result of one optimizer step, equal on every data rank.

    Attributes:
        step: 1 for the first optimizer step of a run.
        loss: scalar fp32 tensor, mean over all valid tokens of the global batch.
        grad_norm: scalar fp32 tensor, global L2 norm of the gradient of `loss` before clipping, loss scale removed.
        skipped: scalar fp32 tensor, 1.0 when the update was skipped for an inf or NaN gradient.
        hyper_parameters: of this step, by name: "lr", and others of the update rule.
        loss_scale: scalar fp32 tensor.
        num_valid_tokens: scalar tensor, tokens of the global batch that contribute loss.
        num_tokens: tokens of the global batch, padding included.
        num_documents: documents in this rank's micro-batches.
        num_pictures: pictures of the global batch, if all data ranks have as many as this one.
        micro_num: micro-batches of this step on each data rank.
        largest_length: tokens of the longest document among this rank's micro-batches.
        largest_batch: largest number of documents in one of this rank's micro-batches.
        smallest_batch: smallest number of documents in one of this rank's micro-batches.
        num_consumed_tokens: tokens since the start of the run, this step included.
        num_consumed_samples: samples since the start of the run, this step included.
        inf_nan_skip_batches: scalar tensor, number of updates skipped since the start of the run.
        seconds: host time of this step by phase: "data" (waiting for the batch), "forward_backward", "optimizer", and
            "total" from the start of the step to the end of the update, without the hooks that follow.
        extra: further scalar tensors, reduced over the global batch: "acc", "perplexity", "loss/<type>", "acc/<type>",
            "tokens/<type>" and others.
    """

    step: int
    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor
    hyper_parameters: Mapping[str, float]
    loss_scale: Tensor
    num_valid_tokens: Tensor
    num_tokens: int
    num_documents: int
    micro_num: int
    largest_length: int
    largest_batch: int
    smallest_batch: int
    num_consumed_tokens: int
    num_consumed_samples: int
    inf_nan_skip_batches: Tensor
    num_pictures: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    _names: list[str] = field(default_factory=list, init=False, repr=False)
    _values: Tensor | None = field(default=None, init=False, repr=False)
    _arrival: torch.cuda.Event | None = field(default=None, init=False, repr=False)

    def start_copy(self) -> None:
        """Start the copy of all values to pinned host memory without waiting. A second call does nothing."""
        if self._values is not None:
            return
        by_dtype: dict[torch.dtype, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in self._tensors().items():
            by_dtype[tensor.dtype][name] = tensor.detach().reshape(())
        self._names = [name for group in by_dtype.values() for name in group]
        values = torch.cat([torch.stack(list(group.values())).double() for group in by_dtype.values()])
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values

    @property
    def has_arrived(self) -> bool:
        """Whether the values are on the host, so that `numbers` does not wait."""
        return self._values is not None and (self._arrival is None or self._arrival.query())

    def numbers(self) -> dict[str, float]:
        """All values as Python numbers, named as in the log line. Waits for the device at most once."""
        self.start_copy()
        assert self._values is not None
        if self._arrival is not None:
            self._arrival.synchronize()
        values = dict(zip(self._names, self._values.tolist(), strict=True))
        numbers: dict[str, float] = {"step": self.step, **{name: values[name] for name in self._tensors()}}
        numbers.update(
            **{_LOGGED[name]: value for name, value in self.hyper_parameters.items() if name in _LOGGED},
            num_tokens=self.num_tokens,
            num_samples_in_batch=self.num_documents,
            micro_num=self.micro_num,
            largest_length=self.largest_length,
            largest_batch=self.largest_batch,
            smallest_batch=self.smallest_batch,
            num_consumed_tokens=self.num_consumed_tokens,
            num_consumed_samples=self.num_consumed_samples,
            **{f"{phase}_time": seconds for phase, seconds in self.seconds.items()},
        )
        return numbers

    def _tensors(self) -> dict[str, Tensor]:
        """The values on the device, in the order of the log line."""
        return {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "skipped": self.skipped,
            "loss_scale": self.loss_scale,
            "valid_tokens": self.num_valid_tokens,
            "inf_nan_skip_batches": self.inf_nan_skip_batches,
            **self.extra,
        }
