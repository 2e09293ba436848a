"""The options of a compared run, as small records with a one-line text form.

`internlm verify --layout` takes the text form, such as `tensor=2,mode=isp,weight=4`, and the fuzzer prints it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from internlm.config.schema import Config, Sequence2DConfig
from internlm.utils.errors import ConfigError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class LayoutChoices:
    """How a run is distributed over its ranks, as keys of the config.

    Attributes:
        tensor: `parallel.tensor.size`.
        mode: `parallel.tensor.mode`.
        context: context ranks, `parallel.context.size`.
        context_placement: "head_first": tensor ranks are consecutive; isp, by `parallel.sequence_2D`: "context_first"
            and "interleaved", its `device_placement_strategy`.
        context_cut: `parallel.context.cut`.
        context_exchange: `parallel.context.exchange`.
        context_window: `window_size` of the same section.
        weight: `parallel.weight.size`.
        overlap: `parallel.weight.overlap`.
        pipeline: `parallel.pipeline.size`.
        schedule: `parallel.pipeline.mode`.
        chunks: `model.num_chunks`.
        zero: `parallel.zero1.size`.
        fsdp: `parallel.fsdp.enable`.
        expert: `parallel.expert.size`.
        expert_zero: `parallel.expert_zero1.size`.
        expert_tensor: not `parallel.expert.no_tp`.
        expert_weight: `parallel.expert_weight.size`.
        expert_overlap: `parallel.expert_weight.overlap`.
    """

    tensor: int = 1
    mode: Literal["mtp", "msp", "fsp", "isp"] = "mtp"
    context: int = 1
    context_placement: Literal["head_first", "context_first", "interleaved"] = "head_first"
    context_cut: Literal["auto", "contiguous", "zigzag", "document_zigzag"] = "auto"
    context_exchange: Literal["auto", "ring", "direct", "all_gather"] = "auto"
    context_window: int = 1
    weight: int = 1
    overlap: bool = False
    pipeline: int = 1
    schedule: Literal["1F1B", "ZBH1", "ZBV", "DUALPIPEV"] = "1F1B"
    chunks: int = 1
    zero: int = -1
    fsdp: bool = False
    expert: int = 1
    expert_zero: int = -1
    expert_tensor: bool = False
    expert_weight: int = 1
    expert_overlap: bool = False

    @classmethod
    def of(cls, config: Config) -> LayoutChoices:
        """The layout of a config."""
        parallel = config.parallel
        return cls(
            tensor=parallel.tensor_ranks,
            mode=parallel.tensor.mode,
            context=parallel.context_ranks,
            context_placement=_placement_of(parallel.sequence_2D),
            context_cut=parallel.context.cut,
            context_exchange=parallel.context.exchange,
            context_window=parallel.context_window,
            weight=parallel.weight.size,
            overlap=parallel.weight.overlap,
            pipeline=parallel.pipeline.size,
            schedule=parallel.pipeline.mode,
            chunks=config.model.num_chunks,
            zero=parallel.zero1.size,
            fsdp=parallel.uses_fsdp,
            expert=parallel.expert.size if config.model.num_experts > 1 else 1,
            expert_zero=parallel.expert_zero1.size,
            expert_tensor=not parallel.expert.no_tp,
            expert_weight=parallel.expert_weight.size,
            expert_overlap=parallel.expert_weight.overlap,
        )

    def keys(self) -> dict[str, Any]:
        """The config keys, by dotted path, that select this layout."""
        is_2d = self.context_placement != "head_first"
        return {
            "parallel.tensor.size": self.tensor * self.context if is_2d else self.tensor,
            "parallel.tensor.mode": self.mode,
            "parallel.sequence_2D": self._sequence_2d() if is_2d else {},
            "parallel.context.size": 1 if is_2d else self.context,
            "parallel.context.cut": self.context_cut,
            "parallel.context.exchange": self.context_exchange,
            "parallel.context.window_size": 1 if is_2d else self.context_window,
            "parallel.weight.size": self.weight,
            "parallel.weight.overlap": self.overlap,
            "parallel.pipeline.size": self.pipeline,
            "parallel.pipeline.mode": self.schedule,
            "model.num_chunks": self.chunks,
            "parallel.zero1.size": self.zero,
            "parallel.zero1.fsdp": False,
            "parallel.fsdp.enable": self.fsdp,
            "parallel.expert.size": self.expert,
            "parallel.expert_zero1.size": self.expert_zero,
            "parallel.expert.no_tp": not self.expert_tensor,
            "parallel.expert_weight.size": self.expert_weight,
            "parallel.expert_weight.overlap": self.expert_overlap,
        }

    def _sequence_2d(self) -> dict[str, Any]:
        return {
            "enable": True,
            "head_size": self.tensor,
            "context_size": self.context,
            "window_size": self.context_window,
            "device_placement_strategy": {
                "head_first": False,
                "interleaved": self.context_placement == "interleaved",
            },
        }


def _placement_of(two: Sequence2DConfig) -> Literal["head_first", "context_first", "interleaved"]:
    if not two.enable:
        return "head_first"
    if two.device_placement_strategy.interleaved:
        return "interleaved"
    return "head_first" if two.device_placement_strategy.head_first else "context_first"


@dataclass(frozen=True)
class ModelChoices:
    """The features of a model that interact with parallelism; all sizes are small.

    Attributes:
        family: `model_type`.
        heads: query heads.
        kv_heads: key-value heads; latent attention has as many as query heads.
        layers: 0 gives each model chunk one layer, and the model at least two.
        vocab: size of the vocabulary.
        tied: `model.tie_word_embeddings`; None is the family's default.
        norm_head: `model.norm_head`; None is the family's default.
        qk_norm: `model.qk_norm`; None is the family's default.
        bias: biases of qkv, wo and the MLP; None is the family's default.
        window: a sliding window in every layer.
        fused: one weight for q, k and v, and one for gate and up; None is the family's default.
        split_hidden: `model.embed_split_hidden`.
        checkpoint: share of the layers that are recomputed in backward.
        save_policy: `model.checkpoint_save_policy` of these layers.
        dtype: of weights and computation.
        fp32_norm: `use_fp32_norm`.
        fp32_residual: `model.residual_in_fp32`.
        float8: `float8.enable_float8_linear`, in every layer; requires float64.
        experts: `model.num_experts`; 1 is a dense model. The family must have experts.
        top_k: `model.top_k`.
        shared_experts: `model.num_shared_experts`.
        router: a set of `model.moe_layer_kwargs`, see `ROUTERS`.
        dense_layers: `model.first_k_dense_replace`; with any, experts have another width.
        q_latent: with latent attention: queries have a latent vector, too.
        selection: `model.moe_type` and further `moe_layer_kwargs`, see `SELECTIONS`.
        multi_token: `model.num_nextn_predict_layers`.
        tower: vision tower of the family LLAVA, see `vision.TOWERS`.
        projector: `model.vision_proj_cfg.mm_projector_type`, of the same family.
    """

    family: str = "INTERNLM2"
    heads: int = 4
    kv_heads: int = 4
    layers: int = 0
    vocab: int = 64
    tied: bool | None = None
    norm_head: bool | None = None
    qk_norm: bool | None = None
    bias: bool | None = None
    window: bool = False
    fused: bool | None = None
    split_hidden: bool = True
    checkpoint: float = 0.0
    save_policy: Literal["nothing", "attention", "matmuls"] = "nothing"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    fp32_norm: bool = False
    fp32_residual: bool = False
    float8: bool = False
    experts: int = 1
    top_k: int = 2
    shared_experts: int = 0
    router: Literal["normalized", "plain", "grouped", "biased", "sigmoid", "sigmoid_grouped"] = "normalized"
    dense_layers: int = 0
    q_latent: bool = True
    selection: Literal["dropless", "largest", "first", "gshard", "gshard_random"] = "dropless"
    multi_token: int = 0
    tower: Literal["clip", "clip_with_class", "siglip"] = "clip"
    projector: Literal["linear", "identity", "mlp2x_gelu"] = "mlp2x_gelu"


@dataclass(frozen=True)
class BatchChoices:
    """The composition of a global batch, apart from its sizes.

    Attributes:
        packed: documents are concatenated in one row; otherwise each row has one padded document.
        ragged: documents have random lengths of at least one token; otherwise `data.seq_len` tokens.
        masked: which labels are masked: "none"; "uneven": a different share of each micro-batch; "micro_batches": all
            of every third micro-batch; "ends": the last three quarters of each micro-batch, which under sequence
            parallelism covers whole ranks; "all".
    """

    packed: bool = True
    ragged: bool = True
    masked: Literal["none", "uneven", "micro_batches", "ends", "all"] = "uneven"


ROUTERS: Mapping[str, Mapping[str, Any]] = {
    "normalized": {},
    "plain": {"normalize_expert_weights": False, "routed_scaling_factor": 1.5},
    "grouped": {"normalize_expert_weights": False, "routed_scaling_factor": 4.0, "n_group": 2, "topk_group": 1},
    "biased": {"selection_bias": True},
    "sigmoid": {"scoring_func": "sigmoid", "normalize_expert_weights": False},
    "sigmoid_grouped": {
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "n_group": 2,
        "topk_group": 1,
        "group_score": "top2_sum",
        "selection_bias": True,
    },
}
"""Name -> `model.moe_layer_kwargs`, of the forms of routers that families have."""

SELECTIONS: Mapping[str, Mapping[str, Any]] = {
    "dropless": {"moe_type": "Dropless"},
    "largest": {"moe_type": "Dropless", "capacity_factor": 0.8, "noisy_gate_policy": "Jitter"},
    "first": {"moe_type": "Dropless", "capacity_factor": 0.8, "drop_policy": "position"},
    "gshard": {"moe_type": "GShard", "capacity_factor": 0.8, "noisy_gate_policy": "Jitter"},
    "gshard_random": {
        "moe_type": "GShard",
        "capacity_factor": 0.8,
        "use_fused_gating": False,
        "noisy_gate_policy": "RSample",
        "min_capacity": 2,
    },
}
"""Name -> `model.moe_type` and `model.moe_layer_kwargs`, of every way to drop tokens and of every noise."""

LATENT_FAMILIES = ("DEEPSEEK_V2", "DEEPSEEK_V3", "KIMI_K2")
"""Families with latent attention."""

LATENT_KEYS: Mapping[str, Any] = {
    "model.q_lora_rank": 20,
    "model.kv_lora_rank": 12,
    "model.qk_nope_head_dim": 8,
    "model.qk_rope_head_dim": 4,
    "model.v_head_dim": 6,
}
"""Small dimensions of latent attention, all different."""

FLOAT8_LATENT_KEYS: Mapping[str, Any] = {
    "model.q_lora_rank": 48,
    "model.kv_lora_rank": 32,
    "model.qk_nope_head_dim": 32,
    "model.qk_rope_head_dim": 16,
    "model.v_head_dim": 16,
}
"""The same in tiles of float8."""

PARAMETER_GROUPS: Mapping[str, list[dict[str, Any]]] = {
    "none": [],
    "frozen_ends": [{"match": "tok_embeddings.*", "freeze": True}, {"match": "norm.*", "freeze": True}],
    "frozen_layer": [
        {"match": "tok_embeddings.*", "freeze": True},
        {"match": "layers.0.*", "freeze": True},
        {"match": "layers.1.*", "lr_factor": 0.5, "weight_decay": 0.3},
    ],
    "frozen_experts": [{"match": "layers.1.feed_forward.experts.*", "freeze": True}],
    "frozen_routers": [
        {"match": "*.router.weight", "freeze": True},
        {"match": "*.experts.*", "lr_factor": 2.0, "weight_decay": 0.0},
    ],
    "projector": [{"match": "*", "freeze": True}, {"match": "vision_proj.*"}],
    "tower": [{"match": "vision_tower.*", "lr_factor": 0.5, "weight_decay": 0.3}],
    "factors": [{"match": "*norm*", "lr_factor": 0.5}, {"match": "layers.0.*", "lr_factor": 2.0, "weight_decay": 0.0}],
}
"""Name -> `optimizer.groups`, with names of parameters that every family has, or every one with experts or pictures."""


@dataclass(frozen=True)
class StepChoices:
    """The micro-batches of an optimizer step, and the settings of the optimizer.

    Attributes:
        micro_batches: per step, over all data ranks; 0 for the number that the pipeline schedule needs.
        clip: maximum norm of the gradient; 0 disables clipping.
        bucket: elements of a gradient bucket.
        overlap_grad: `hybrid_zero_optimizer.overlap_sync_grad`.
        overlap_param: `hybrid_zero_optimizer.overlap_sync_param`.
        reduce_bf16: gradients are reduced in bf16.
        grad_bf16: gradients are accumulated in bf16.
        moments_bf16: moments are stored in bf16.
        offload: masters and moments are stored on the host, except in the reference run of one process.
        groups: a set of `optimizer.groups`, see `PARAMETER_GROUPS`.
    """

    micro_batches: int = 0
    clip: float = 0.5
    bucket: int = 3000
    overlap_grad: bool = False
    overlap_param: bool = False
    reduce_bf16: bool = False
    grad_bf16: bool = False
    moments_bf16: bool = False
    offload: bool = False
    groups: Literal[
        "none",
        "frozen_ends",
        "frozen_layer",
        "frozen_experts",
        "frozen_routers",
        "projector",
        "tower",
        "factors",
    ] = "none"


def to_text(choices: Any) -> str:
    """`name=value` of every field that differs from its default, joined by commas."""
    parts = []
    for field in dataclasses.fields(choices):
        value = getattr(choices, field.name)
        if value != field.default:
            parts.append(f"{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return ",".join(parts)


def from_text(cls: type[T], text: str) -> T:
    """Parse the output of `to_text`.

    Args:
        cls: one of the classes above.
        text: may have a flag without `=true`.

    Raises:
        ConfigError: lists all unknown names and invalid values.
    """
    hints = get_type_hints(cls)
    values, problems = {}, []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in hints:
            problems.append(f"'{part}': unknown name '{name}', known: {', '.join(hints)}.{nearest(name, hints)}")
            continue
        try:
            values[name] = _parse(hints[name], value if equals else "true")
        except ValueError as error:
            problems.append(f"'{part}': {error}")
    if problems:
        raise ConfigError(problems)
    return cls(**values)


def _parse(kind: Any, text: str) -> Any:
    if kind in (bool, bool | None):
        if text.lower() not in ("true", "false"):
            raise ValueError("expected true or false")
        return text.lower() == "true"
    if kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}") from None
    choices = get_args(kind)
    for choice in choices:
        if choice.lower() == text.lower():
            return choice
    raise ValueError(f"expected one of {', '.join(choices)}.{nearest(text, choices)}")
