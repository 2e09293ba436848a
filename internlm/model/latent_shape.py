"""The dimensions of multi-head latent attention, resolved from the `model` section of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig


@dataclass(frozen=True)
class LatentShape:
    """The dimensions of the projections; see `modules/latent_attention.py`.

    Attributes:
        q_rank: channels of the latent vector of queries; None: queries are projected directly.
        kv_rank: channels of the latent vector of keys and values.
        plain_dim: channels of a query or key head without rotary embedding.
        rotary_dim: channels with rotary embedding; those of keys are shared by all heads.
        value_dim: channels of a value head.
    """

    q_rank: int | None
    kv_rank: int
    plain_dim: int
    rotary_dim: int
    value_dim: int

    @property
    def head_dim(self) -> int:
        """Channels of a query or key head."""
        return self.plain_dim + self.rotary_dim

    @property
    def down_rows(self) -> int:
        """Rows of `wkv_a`: the latent vector, and the rotary key."""
        return self.kv_rank + self.rotary_dim


_REQUIRED = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_WITHOUT_EFFECT = (
    *("head_dim", "partial_rotary_factor", "qk_norm", "no_bias", "qkv_bias", "o_bias", "enable_qkv_fusion"),
    "clip_qkv",
)


def latent_shape(config: ModelConfig, is_latent: bool, mistakes: list[str]) -> LatentShape | None:
    """The dimensions of the latent attention of a config.

    Args:
        config: the `model` section.
        is_latent: whether the family has latent attention.
        mistakes: receives a line for each key that is missing, or that contradicts the family.

    Returns:
        None if the family has no latent attention, or a key is missing.
    """
    if not is_latent:
        given = [key for key in (*_REQUIRED, "q_lora_rank") if getattr(config, key) is not None]
        mistakes += [
            f"model.{key} = {getattr(config, key)}: this model_type has no latent attention; leave the key out, or "
            "choose one that has it, such as DEEPSEEK_V3"
            for key in given
        ]
        if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
            mistakes.append("model.rope_scaling.mscale_all_dim: only for latent attention; leave it and mscale out")
        return None
    missing = [key for key in _REQUIRED if getattr(config, key) is None]
    mistakes += [f"model.{key}: latent attention needs it" for key in missing]
    heads = config.num_attention_heads
    if config.num_kv_attention_heads not in (None, heads):
        mistakes.append(
            f"model.num_kv_attention_heads = {config.num_kv_attention_heads}: latent attention has as many key-value "
            f"heads as query heads ({heads}); leave the key out"
        )
    mistakes += [
        f"model.{key} = {getattr(config, key)}: latent attention does not support it; leave the key out"
        for key in _WITHOUT_EFFECT
        # False asks for what latent attention has: no biases, no norms of heads, nothing fused.
        if getattr(config, key) not in (None, key == "no_bias")
    ]
    rotary = config.qk_rope_head_dim
    if rotary is not None and rotary % 2:
        mistakes.append(f"model.qk_rope_head_dim = {rotary} must be even: rotary embedding rotates pairs of channels")
    if missing:
        return None
    return LatentShape(
        q_rank=config.q_lora_rank,
        kv_rank=config.kv_lora_rank or 0,
        plain_dim=config.qk_nope_head_dim or 0,
        rotary_dim=config.qk_rope_head_dim or 0,
        value_dim=config.v_head_dim or 0,
    )
