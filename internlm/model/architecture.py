"""The complete specification of a decoder, resolved from the `model` section of a config and a model family.

`Architecture.resolve(config, ...)` replaces keys that are None by the defaults of the family. Modules and ops never
read the config.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

import torch

from internlm.model.initialization import Initializer, Normal, Uniform
from internlm.model.latent_shape import LatentShape, latent_shape
from internlm.model.layer_kinds import expert_layers
from internlm.model.modules.rotary import RopeSettings, yarn_temperature
from internlm.model.moe.settings import expert_settings
from internlm.model.ops.gated_activation import Activation
from internlm.model.recompute import SavePolicy
from internlm.utils.errors import ConfigError

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig
    from internlm.config.schema.rope_scaling import RopeScalingConfig
    from internlm.model.layer_kinds import LayerKind
    from internlm.model.moe.settings import ExpertSettings, SharedMix

T = TypeVar("T")


@dataclass(frozen=True)
class FamilyDefaults:
    """The properties of a model family: defaults of config keys that are None, and properties without a key.

    Attributes:
        fused_qkv, fused_gate_up: one weight for wq, wk, wv / for w1, w3.
        qkv_bias, o_bias, mlp_bias: biases of the projections.
        qk_norm: RMSNorm of each query and key head.
        norms_whole_projections: the RMSNorm of `qk_norm` is over all heads together.
        tie_word_embeddings: the output head is the embedding.
        norm_head: the rows of the output head are normalized.
        activation: of the feed-forward gate.
        unit_offset_norm: norms scale by 1 + weight.
        scale_embedding: embeddings are multiplied by sqrt(hidden_size).
        partial_rotary_factor: share of the channels of a head that rotate.
        attention_sinks: every head has a learned logit in the denominator of its softmax.
        expert_biases: routers and routed experts have biases.
        sliding_window: layers have a window whenever its size is given, even without `use_sliding_window`.
        sliding_window_pattern: the number of layers of which the last has full attention; None: no layer has.
        latent_attention: attention is that of `modules/latent_attention.py`.
    """

    fused_qkv: bool = False
    fused_gate_up: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norms_whole_projections: bool = False
    tie_word_embeddings: bool = False
    norm_head: bool = False
    activation: Activation = "silu"
    unit_offset_norm: bool = False
    scale_embedding: bool = False
    partial_rotary_factor: float = 1.0
    attention_sinks: bool = False
    expert_biases: bool = False
    sliding_window: bool = False
    sliding_window_pattern: int | None = None
    latent_attention: bool = False


@dataclass(frozen=True)
class InitSettings:
    """Standard deviations of the initial weights, and their distribution."""

    distribution: Literal["normal", "uniform"] = "normal"
    scaled: bool = True
    embedding: float = 0.02
    attention_wqkv: float = 0.02
    attention_other: float = 0.02
    ffn_up: float = 0.02
    ffn_other: float = 0.02
    head: float = 0.02

    def initializer(self, std: float) -> Initializer:
        """The initializer of weights with this standard deviation."""
        return Normal(std) if self.distribution == "normal" else Uniform(math.sqrt(3.0) * std)


@dataclass(frozen=True)
class Architecture:
    """A fully specified decoder. Fields without a description are those of the config or of `FamilyDefaults`."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    fused_qkv: bool
    fused_gate_up: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norms_whole_projections: bool
    clip_qkv: float | None
    attention_sinks: bool
    norm_type: Literal["rmsnorm", "layernorm"]
    norm_eps: float
    norm_dtype: torch.dtype
    unit_offset_norm: bool
    activation: Activation
    rope: RopeSettings
    max_position_embeddings: int
    """Context length in tokens, including an extension of static length: `ModelConfig.context_length`."""
    windows: tuple[int | None, ...]
    """The attention window of each layer."""
    tie_word_embeddings: bool
    norm_head: bool
    is_reward: bool
    """The head returns one number per token instead of logits."""
    embedding_multiplier: float
    embed_grad_scale: float
    """Factor on the gradient of the embedding (GLM-130B, https://arxiv.org/abs/2210.02414)."""
    attention_backend: str
    """Attention kernel on CUDA: "auto" or a name in `internlm/model/ops/attention/cuda_backends.py`."""
    use_flash_attn: bool
    """Attention may use the flash-attn packages."""
    fused_kernels: str
    """Fused kernels between GEMMs in uncompiled blocks: "auto", "none", "liger"."""
    residual_in_fp32: bool
    """The residual stream is in fp32."""
    save_policies: tuple[SavePolicy, ...]
    """Save policy of each layer."""
    dtype: torch.dtype
    init: InitSettings
    num_multi_token: int = 0
    """Number of layers behind the model that predict later tokens; see `internlm.model.decoder.MultiTokenLayer`."""
    experts: ExpertSettings | None = None
    """The expert layers; None: all layers are dense."""
    latent: LatentShape | None = None
    """The dimensions of latent attention (`head_dim`: of queries and keys); None: grouped-query attention."""
    layer_kinds: Mapping[int, LayerKind] = field(default_factory=dict, hash=False)
    """Kinds of the layers that are not standard, by layer number."""

    @property
    def multi_token_layers(self) -> range:
        """Numbers of the layers that predict later tokens: they follow those of the model."""
        return range(self.num_layers, self.num_layers + self.num_multi_token)

    @property
    def with_multi_token_layers(self) -> Architecture:
        """This specification, in which the layers that predict later tokens have the properties of the last layer."""
        kind = self.layer_kinds.get(self.num_layers - 1)
        more = dict.fromkeys(self.multi_token_layers, kind) if kind is not None else {}
        return dataclasses.replace(
            self,
            windows=self.windows + self.windows[-1:] * self.num_multi_token,
            save_policies=self.save_policies + self.save_policies[-1:] * self.num_multi_token,
            layer_kinds={**self.layer_kinds, **more},
        )

    @property
    def layers_with_experts(self) -> list[int]:
        """Numbers of the layers with experts, those that predict later tokens included."""
        if self.experts is None:
            return []
        own = self.experts.layers(self.num_layers)
        return own + (list(self.multi_token_layers) if self.num_layers - 1 in own else [])

    @property
    def function(self) -> dict[str, object]:
        """Everything except the weights that determines the function of the model, by name.

        Dtypes, kernels and the fusion of weights are excluded.
        """
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        values["layer_kinds"] = {number: kind.name for number, kind in self.layer_kinds.items()}
        rope = {f"rope {name}": value for name, value in self.rope.function.items()}
        return {name: value for name, value in values.items() if name not in _NOT_IN_FUNCTION} | rope

    @classmethod
    def resolve(
        cls,
        config: ModelConfig,
        defaults: FamilyDefaults | None = None,
        *,
        norm_dtype: torch.dtype | None = None,
        shared_mix: SharedMix | None = None,
    ) -> Architecture:
        """Combine a config with the defaults of a family.

        Args:
            config: the `model` section.
            defaults: the family; None: Llama.
            norm_dtype: dtype of the norms' weights; None: that of the model.
            shared_mix: of the shared experts of a family with expert layers; None: the family is dense.

        Raises:
            ConfigError: sizes are inconsistent, or a key contradicts the family.
        """
        family = defaults or FamilyDefaults()
        mistakes: list[str] = []
        num_heads = config.num_attention_heads
        num_kv_heads = _pick(config.num_kv_attention_heads, num_heads)
        if num_heads % num_kv_heads:
            mistakes.append(
                f"model.num_attention_heads ({num_heads}) must be a multiple of "
                f"model.num_kv_attention_heads ({num_kv_heads})"
            )
        latent = latent_shape(config, family.latent_attention, mistakes)
        if config.head_dim is None and config.hidden_size % num_heads and not family.latent_attention:
            mistakes.append(
                f"model.hidden_size ({config.hidden_size}) must be a multiple of model.num_attention_heads "
                f"({num_heads}); change one of them, or set model.head_dim"
            )
        head_dim = _pick(config.head_dim, config.hidden_size // num_heads) if latent is None else latent.head_dim
        rotary_factor = _pick(config.partial_rotary_factor, family.partial_rotary_factor)
        rotary_dim = int(head_dim * rotary_factor) if latent is None else latent.rotary_dim
        if latent is None and (rotary_dim % 2 or not rotary_dim):
            part = "" if rotary_factor == 1 else f" times model.partial_rotary_factor ({rotary_factor})"
            mistakes.append(
                f"the head dimension ({head_dim}){part} must be even: rotary embedding rotates pairs of channels"
            )
        if config.add_unit_offset not in (None, family.unit_offset_norm):
            mistakes.append(f"model.add_unit_offset: this model_type has {family.unit_offset_norm}; leave the key out")
        if config.use_swiglu not in (None, family.activation == "silu"):
            mistakes.append(
                f"model.use_swiglu = {config.use_swiglu}: the gate of this model_type is {_GATES[family.activation]}; "
                "leave the key out"
            )
        if shared_mix is None and config.num_experts > 1:
            mistakes.append(
                f"model.num_experts = {config.num_experts}: this model_type is dense; choose one with experts, such as "
                "MIXTRALMOE, or leave the key out"
            )
        if config.is_reward and config.num_nextn_predict_layers:
            mistakes.append(
                f"model.num_nextn_predict_layers = {config.num_nextn_predict_layers}: a reward model predicts no "
                "tokens; leave the key out"
            )
        if mistakes:
            raise ConfigError(mistakes)
        experts = None if shared_mix is None else expert_settings(config, shared_mix, family.expert_biases)
        # `no_bias` applies to all attention projections; the keys of single projections take precedence.
        attention_bias = None if config.no_bias is None else not config.no_bias
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            # Without dense layers nothing has the width of the MLP.
            intermediate_size=config.ffn_size if experts is None or experts.dense_layers else experts.width,
            fused_qkv=_pick(config.enable_qkv_fusion, family.fused_qkv),
            fused_gate_up=_pick(config.mlp_layer_fusion, family.fused_gate_up),
            qkv_bias=_pick(config.qkv_bias, attention_bias, family.qkv_bias),
            o_bias=_pick(config.o_bias, attention_bias, family.o_bias),
            mlp_bias=_pick(config.mlp_bias, family.mlp_bias),
            qk_norm=_pick(config.qk_norm, family.qk_norm),
            norms_whole_projections=family.norms_whole_projections and config.qk_norm is not False,
            clip_qkv=config.clip_qkv,
            attention_sinks=family.attention_sinks,
            norm_type=_pick(config.norm_type, "rmsnorm"),
            norm_eps=config.layer_norm_epsilon,
            norm_dtype=norm_dtype or config.torch_dtype,
            unit_offset_norm=family.unit_offset_norm,
            activation=family.activation,
            rope=_rope_settings(config, rotary_dim),
            max_position_embeddings=config.context_length or config.max_position_embeddings,
            windows=_windows(config, family),
            tie_word_embeddings=_pick(config.tie_word_embeddings, family.tie_word_embeddings) and not config.is_reward,
            norm_head=_pick(config.norm_head, family.norm_head),
            is_reward=config.is_reward,
            embedding_multiplier=math.sqrt(config.hidden_size) if family.scale_embedding else 1.0,
            embed_grad_scale=config.embed_grad_scale,
            attention_backend=config.attention_backend,
            use_flash_attn=config.use_flash_attn,
            fused_kernels=config.fused_kernels,
            residual_in_fp32=config.residual_in_fp32,
            save_policies=save_policies(config),
            dtype=config.torch_dtype,
            init=InitSettings(
                distribution=config.init_type,
                scaled=config.use_scaled_init,
                embedding=config.embedding_init_std,
                attention_wqkv=config.attn_wqkv_init_std,
                attention_other=config.attn_other_init_std,
                ffn_up=config.ffn_uplayer_init_std,
                ffn_other=config.ffn_other_init_std,
                head=config.out_head_init_std,
            ),
            num_multi_token=config.num_nextn_predict_layers,
            experts=experts,
            latent=latent,
            layer_kinds={} if experts is None else expert_layers(experts, config.num_layers),
        )


_GATES: dict[Activation, str] = {"silu": "SiLU", "gelu_tanh": "GELU", "clamped_silu": "a clamped SiLU"}

_NOT_IN_FUNCTION = {
    *("fused_qkv", "fused_gate_up"),
    # Covered by `RopeSettings.function`.
    *("rope", "max_position_embeddings"),
    *("norm_dtype", "dtype", "residual_in_fp32", "attention_backend", "use_flash_attn", "fused_kernels"),
    *("save_policies", "embed_grad_scale", "init", "num_multi_token"),
}
"""Fields of `Architecture` that do not change the function of a model; any other field, also a new one, does."""


def _pick(*choices: T | None) -> T:
    """The first choice that is not None; the last never is."""
    for choice in choices:
        if choice is not None:
            return choice
    raise AssertionError("no default")


def _windows(config: ModelConfig, family: FamilyDefaults) -> tuple[int | None, ...]:
    if not (config.use_sliding_window or family.sliding_window) or config.sliding_window is None:
        return (None,) * config.num_layers
    pattern = config.sliding_window_pattern or family.sliding_window_pattern or config.num_layers + 1
    return tuple(
        config.sliding_window if layer >= config.max_window_layers and (layer + 1) % pattern else None
        for layer in range(config.num_layers)
    )


def save_policies(config: ModelConfig) -> tuple[SavePolicy, ...]:
    """The save policy of each layer, from `checkpoint` and `checkpoint_save_policy`."""
    everything: tuple[SavePolicy, ...] = ("everything",)
    return (config.checkpoint_save_policy,) * config.num_recomputed + everything * (
        config.num_layers - config.num_recomputed
    )


def _rope_settings(config: ModelConfig, rotary_dim: int) -> RopeSettings:
    plain = RopeSettings(
        head_dim=rotary_dim,
        base=config.rope_base,
        rope_type="dynamic" if config.use_dynamic_ntk_rope else "default",
        max_positions=config.max_position_embeddings,
        interleaved=config.qk_interleaved,
        fp32=config.use_fp32_rope,
    )
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = _yarn_attention_factor(scaling) if scaling.type == "yarn" else 1.0
    return dataclasses.replace(
        plain,
        rope_type=scaling.type,
        factor=scaling.factor,
        max_positions=scaling.original_max_position_embeddings or config.max_position_embeddings,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        beta_slow=scaling.beta_slow,
        beta_fast=scaling.beta_fast,
        truncate=scaling.truncate,
        attention_factor=attention_factor,
        mscale=scaling.mscale,
        mscale_all_dim=scaling.mscale_all_dim,
    )


def _yarn_attention_factor(scaling: RopeScalingConfig) -> float:
    """Factor on cosines and sines: with `mscale_all_dim`, which scales all channels, the ratio of the temperatures."""
    if scaling.mscale and scaling.mscale_all_dim:
        of_all = yarn_temperature(scaling.factor, scaling.mscale_all_dim)
        return yarn_temperature(scaling.factor, scaling.mscale) / of_all
    return yarn_temperature(scaling.factor)
