"""Dtypes and device of gradients and optimizer state between steps.

Arithmetic is always in fp32, or in float64 for float64 parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def master_dtype(parameter: torch.dtype) -> torch.dtype:
    """The dtype of masters and of arithmetic for parameters of a dtype: fp32 or float64."""
    return torch.promote_types(parameter, torch.float32)


@dataclass(frozen=True)
class StateForm:
    """Dtypes and device of the gradients and optimizer state of all buckets.

    Attributes:
        gradients: dtype in which gradients of half-precision parameters are accumulated over micro batches and summed
            over ranks, bf16 or fp32. Gradients of other parameters have the dtype of the parameters.
        moments: dtype of the update rule's state, bf16 or fp32; float64 parameters have float64 state.
        is_offloaded: masters and state are in host memory and updated by the CPU.
    """

    gradients: torch.dtype = torch.float32
    moments: torch.dtype = torch.float32
    is_offloaded: bool = False

    def gradient_dtype(self, parameter: torch.dtype) -> torch.dtype:
        """Dtype of the gradients of parameters of a dtype."""
        return parameter if parameter == master_dtype(parameter) else self.gradients

    def moment_dtype(self, parameter: torch.dtype) -> torch.dtype:
        """Dtype of the state of parameters of a dtype."""
        return parameter if parameter == torch.float64 else self.moments

    def has_master(self, parameter: torch.dtype) -> bool:
        """Whether parameters of a dtype in a flat buffer have separate masters."""
        return self.is_offloaded or parameter != master_dtype(parameter)

    def state_device(self, device: torch.device) -> torch.device:
        """Device of masters and state for parameters on `device`."""
        return torch.device("cpu") if self.is_offloaded else device


FP32_STATE = StateForm()
"""All in fp32, on the device."""
