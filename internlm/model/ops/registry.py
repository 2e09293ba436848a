"""Which implementation of each op runs on a device, and why.

Each op module dispatches on what is installed and what the device can do, and its `choice` function tells what comes of
the same facts. Nothing falls back silently: what `describe` returns is for `doctor` and the training log to print.
"""

from __future__ import annotations

import torch

from internlm.model.ops import attention, cross_entropy, float8, gated, norm, rotary
from internlm.model.ops.choice import Choice


def describe(device: torch.device | str, *, use_flash_attn: bool = True, use_float8: bool = False) -> dict[str, Choice]:
    """Op name -> `Choice` for every op, on `device`.

    Args:
        use_flash_attn: the config's `model.use_flash_attn`.
        use_float8: the config's `float8.enable_float8_linear`; without it, there is no such op.
    """
    device = torch.device(device)
    return {
        "attention": attention.choice(device, use_flash_attn=use_flash_attn),
        **({"float8_linear": float8.choice(device)} if use_float8 else {}),
        "gated_activation": gated.choice(device),
        "layer_norm": norm.layer_norm_choice(device),
        "linear_cross_entropy": cross_entropy.choice(device),
        "rms_norm": norm.rms_norm_choice(device),
        "rotary": rotary.choice(device),
    }
