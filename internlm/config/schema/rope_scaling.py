"""The `model.rope_scaling` section."""

from __future__ import annotations

from typing import Literal

from internlm.config.schema.base import Section, key, used_with


class RopeScalingConfig(Section):
    """Rotary positions beyond the length of pretraining."""

    type: Literal["linear", "dynamic", "llama3", "yarn"] = key(..., "Kind of scaling.", changes_outputs=True)
    factor: float = key(1.0, "Ratio of the new length to the original one.", ge=1, changes_outputs=True)
    original_max_position_embeddings: int | None = key(
        None, "Length of pretraining; None: model.max_position_embeddings.", ge=1, changes_outputs=True
    )
    low_freq_factor: float = key(
        1.0, "llama3: wavelengths above original length / this are scaled fully.", gt=0, changes_outputs=True
    )
    high_freq_factor: float = key(
        4.0, "llama3: wavelengths below original length / this are unchanged.", gt=0, changes_outputs=True
    )
    beta_fast: float = key(32.0, "yarn: rotations above which a dimension is unchanged.", gt=0, changes_outputs=True)
    truncate: bool = key(True, "yarn: round the bounds of the ramp to whole pairs of channels.", changes_outputs=True)
    beta_slow: float = key(1.0, "yarn: rotations below which a dimension is scaled fully.", gt=0, changes_outputs=True)
    attention_factor: float | None = key(
        None, "yarn: factor on cos and sin; None: 0.1 ln(factor) + 1.", gt=0, changes_outputs=True
    )
    mscale: float = used_with(
        0.0,
        "yarn with latent attention: cos and sin have the factor (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim "
        "ln(factor) + 1).",
        "model.rope_scaling.mscale_all_dim",
        ge=0,
        changes_outputs=True,
    )
    mscale_all_dim: float = key(
        0.0,
        "yarn with latent attention: scores have the factor (0.1 mscale_all_dim ln(factor) + 1)^2.",
        ge=0,
        changes_outputs=True,
    )
