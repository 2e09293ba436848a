"""Which implementation of each op runs on a device, and why.

Each op module dispatches on installed packages and on the device; its `choice` function reports the result for the
same facts. No fallback is silent: `doctor` and the training log print the result of `describe`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from internlm.model.ops import cross_entropy, grouped_linear, linear, norm, rotary
from internlm.model.ops import gated_activation as gated
from internlm.model.ops.attention import causal_attention as attention
from internlm.model.ops.attention import partial_attention
from internlm.model.ops.attention.cuda_backends import AttentionNeeds, capability_of
from internlm.model.ops.float8 import grouped_gemm as float8_grouped
from internlm.model.ops.float8 import scaled_gemm as float8
from internlm.model.ops.implementation_choice import Choice

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@dataclass(frozen=True)
class OpSettings:
    """Settings of a model that the choice of implementations depends on; defaults as in the config.

    Attributes:
        dtype, head_dim: of queries and keys.
        attention_backend, use_flash_attn, fused_kernels: the keys of these names in the config's `model` section.
        compiled: the ops run inside compiled blocks.
        use_float8: linear layers run their GEMMs in float8; otherwise the float8 ops are left out.
    """

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    attention_backend: str = "auto"
    use_flash_attn: bool = True
    fused_kernels: str = "auto"
    compiled: bool = False
    use_float8: bool = False

    @classmethod
    def of(cls, config: ModelConfig, *, use_float8: bool = False) -> OpSettings:
        """The settings of a config's `model` section, and of `float8.enable_float8_linear`."""
        return cls(
            config.torch_dtype,
            config.attention_head_dim,
            config.attention_backend,
            config.use_flash_attn,
            config.fused_kernels,
            config.compile,
            use_float8,
        )

    def attention_needs(self, device: torch.device) -> AttentionNeeds:
        """The needs of packed attention on this device."""
        return AttentionNeeds(capability_of(device), self.dtype, self.head_dim, compiled=self.compiled)


def describe(device: torch.device | str, settings: OpSettings | None = None) -> dict[str, Choice]:
    """Op name -> `Choice` for every op, on `device`.

    Raises:
        ConfigError: a setting requires an implementation that cannot be used.
    """
    device, settings = torch.device(device), settings or OpSettings()
    kernels, compiled = settings.fused_kernels, settings.compiled
    choices = {
        "attention": attention.choice(
            device,
            settings.attention_needs(device),
            attention_backend=settings.attention_backend,
            use_flash_attn=settings.use_flash_attn,
        ),
        **(
            {"float8_linear": float8.choice(device), "float8_grouped_linear": float8_grouped.choice(device)}
            if settings.use_float8
            else {}
        ),
        "gated_activation": gated.choice(device, kernels, compiled=compiled),
        "grouped_linear": grouped_linear.choice(device, settings.dtype),
        "layer_norm": norm.layer_norm_choice(device),
        "linear": linear.choice(device, settings.dtype),
        "linear_cross_entropy": cross_entropy.choice(device),
        "partial_attention": partial_attention.choice(device, settings.dtype, settings.head_dim),
        "rms_norm": norm.rms_norm_choice(device, kernels, compiled=compiled),
        "rotary": rotary.choice(device),
    }
    if compiled:
        fused = Choice("plain operators, compiled with the layer", "in a compiled block, fused with their neighbors")
        choices |= dict.fromkeys(("gated_activation", "layer_norm", "rms_norm", "rotary"), fused)
    return choices
