"""In which dtypes gradients and AdamW's moments are kept between steps, and where.

Arithmetic is in fp32 always, but for float64 parameters, of which all is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def wide(parameter: torch.dtype) -> torch.dtype:
    """The dtype of masters, and of arithmetic, for parameters of a dtype: fp32, or float64."""
    return torch.promote_types(parameter, torch.float32)


@dataclass(frozen=True)
class StateForm:
    """How the gradients and the optimizer state of all buckets are kept.

    Attributes:
        gradients: dtype in which gradients of half-precision parameters are accumulated over micro batches and summed
            over ranks, bf16 or fp32. Those of other parameters are kept in the dtype of the parameters.
        moments: dtype of AdamW's two moments, bf16 or fp32; of float64 parameters float64.
        is_offloaded: masters and moments lie in host memory and are updated by the CPU.
    """

    gradients: torch.dtype = torch.float32
    moments: torch.dtype = torch.float32
    is_offloaded: bool = False

    def gradient_dtype(self, parameter: torch.dtype) -> torch.dtype:
        """Of the gradients of parameters of a dtype."""
        return parameter if parameter == wide(parameter) else self.gradients

    def moment_dtype(self, parameter: torch.dtype) -> torch.dtype:
        """Of the moments of parameters of a dtype."""
        return parameter if parameter == torch.float64 else self.moments

    def has_master(self, parameter: torch.dtype) -> bool:
        """Whether parameters of a dtype, of which a rank keeps a flat buffer, have masters beside them."""
        return self.is_offloaded or parameter != wide(parameter)

    def state_device(self, device: torch.device) -> torch.device:
        """Where masters and moments lie when the parameters are on `device`."""
        return torch.device("cpu") if self.is_offloaded else device


FP32_STATE = StateForm()
"""All in fp32, on the device."""
