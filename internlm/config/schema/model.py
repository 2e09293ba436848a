"""The `model` section: the one place for model defaults.

A key with default None is the family's choice (biases, head norm, tied embeddings ...): `internlm.model` resolves it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from internlm.config.schema.base import Section, key, later, library_only, no_effect, section, used_with
from internlm.config.schema.moe import MoeLayerConfig
from internlm.config.schema.rope_scaling import RopeScalingConfig
from internlm.config.schema.vision import VisionProjectorConfig, VisionTowerConfig

if TYPE_CHECKING:
    import torch

Dtype = Literal["torch.bfloat16", "torch.float16", "torch.half", "torch.float32", "torch.tf32", "torch.float64"]

_MAX_POSITIONS = 2048
"""Context length without a key, InternEvo's too."""


_injection = partial(
    no_effect,
    reason="a class of transformers is trained with model_type = 'hf', which adapts its layers to every layout",
)


class InjectInfoConfig(Section):
    """InternEvo's exchange of layers of a foreign model for parallel ones."""

    inject: bool = _injection(False, "Exchange the layers.")
    interactive: bool = _injection(False, "Ask before each exchange.")
    modules: tuple[str, ...] = _injection((), "Kinds to exchange: embed, linear, norm.")
    reset_params: bool = _injection(False, "Reinitialize the exchanged layers.")
    extra_linear2newlinear: dict[str, Any] | None = later(
        None,
        "Further linear classes to exchange.",
        "exchanging linear layers of other classes",
        accepts=({},),
        changes_outputs=False,
    )
    data_helper: bool = _injection(False, "Adapt batches to the model's arguments.")


class ModelConfig(Section):
    """Shape and numerics of the model; `model_type` of the root names the family."""

    # Shape.
    vocab_size: int = key(..., "Size of the vocabulary.", ge=1, changes_outputs=True)
    hidden_size: int = key(..., "Width of the residual stream.", ge=1, changes_outputs=True)
    num_layers: int = key(..., "Transformer layers.", ge=1, changes_outputs=True)
    num_attention_heads: int = key(..., "Query heads.", ge=1, changes_outputs=True)
    num_kv_attention_heads: int | None = key(
        None, "Key and value heads (GQA); None: the family's choice.", ge=1, changes_outputs=True
    )
    head_dim: int | None = key(
        None, "Size of a head; None: the family's choice, usually hidden_size / heads.", ge=1, changes_outputs=True
    )
    kv_lora_rank: int | None = key(
        None,
        "Latent attention (DeepSeek): channels of the latent vector of keys and values.",
        ge=1,
        changes_outputs=True,
    )
    q_lora_rank: int | None = used_with(
        None,
        "Channels of the latent vector of queries; None: queries are projected directly.",
        "model.kv_lora_rank",
        ge=1,
        changes_outputs=True,
    )
    qk_nope_head_dim: int | None = used_with(
        None,
        "Channels of a query or key head without rotary embedding.",
        "model.kv_lora_rank",
        ge=1,
        changes_outputs=True,
    )
    qk_rope_head_dim: int | None = used_with(
        None,
        "Channels of a query head with rotary embedding; all key heads share theirs.",
        "model.kv_lora_rank",
        ge=2,
        changes_outputs=True,
    )
    v_head_dim: int | None = used_with(
        None, "Channels of a value head.", "model.kv_lora_rank", ge=1, changes_outputs=True
    )
    mlp_ratio: float = key(
        4.0, "Width of the MLP / hidden_size, before rounding up to multiple_of.", gt=0, changes_outputs=True
    )
    multiple_of: int = key(256, "The MLP's width is rounded up to a multiple of this.", ge=1, changes_outputs=True)
    intermediate_size: int | None = key(
        None, "Exact width of the MLP; overrides mlp_ratio and multiple_of.", ge=1, changes_outputs=True
    )
    tie_word_embeddings: bool | None = key(
        None, "Use the embedding as the head weight; None: the family's choice.", changes_outputs=True
    )
    is_reward: bool = library_only(
        False,
        "One scalar per token instead of logits; the library builds, loads and imports such a model.",
        "the training loop predicts the next token; a reward head needs your own loop",
        changes_outputs=True,
    )

    # Numerics.
    dtype: Annotated[Dtype, BeforeValidator(str)] = key(
        "torch.bfloat16",
        "Dtype of weights and computation (InternEvo's default is float16); torch.float64, on a CPU, is for "
        "comparisons.",
        changes_outputs=False,
    )
    cpu_gemm: Literal["auto", "dtype", "fp32"] = key(
        "auto",
        "Dtype of the GEMMs of 16-bit models on CPUs: that dtype, or fp32 (operands converted, the result rounded "
        "once); auto: whichever was faster on CPUs with the same features.",
        changes_outputs=False,
    )
    residual_in_fp32: bool = key(False, "Keep the residual stream in float32.", changes_outputs=False)
    use_flash_attn: bool = key(
        True,
        "Use a flash-attn package if installed; the log and `internlm doctor` name the kernel in use.",
        changes_outputs=False,
    )
    attention_backend: Literal[
        "auto", "flash-attn-2", "flash-attn-3", "flash-attn-4", "torch-varlen", "sdpa", "flex", "reference"
    ] = key("auto", "Attention kernel on GPUs; auto: the best one available (see kernels.md).", changes_outputs=False)
    fused_kernels: Literal["auto", "none", "liger"] = key(
        "auto",
        "Kernels of norms and activations on GPUs in uncompiled blocks; auto: Liger's if installed.",
        changes_outputs=False,
    )
    checkpoint: float = key(
        0.0,
        "Recompute activations of the first int(layers * fraction) layers; True is 1.",
        ge=0,
        le=1,
        changes_outputs=False,
    )
    checkpoint_save_policy: Literal["nothing", "attention", "matmuls"] = used_with(
        "nothing",
        "What a recomputed layer saves besides its input: nothing, the output of attention, or of all GEMMs too.",
        "model.checkpoint",
        changes_outputs=False,
    )
    checkpoint_budget: float | None = key(
        None,
        "Budget in GiB for the saved layer activations of a micro-batch on a rank: each layer recomputes as little as "
        "fits. Replaces model.checkpoint.",
        gt=0,
        changes_outputs=False,
    )

    compile: bool = key(
        False,
        "Compile each layer with torch.compile: faster steps and less memory, after about a minute of compilation.",
        changes_outputs=False,
    )
    cuda_graphs: bool = used_with(
        False,
        "Launch the kernels of each compiled layer as CUDA graphs, for small models on GPUs; takes more memory (see "
        "performance.md). Not yet run on a GPU.",
        "model.compile",
        changes_outputs=False,
    )

    # Norms.
    norm_type: Literal["rmsnorm", "layernorm"] | None = key(
        None, "Kind of norm; None: the family's choice.", changes_outputs=True
    )
    layer_norm_epsilon: float = key(1e-5, "Epsilon that norms add to the variance.", gt=0, changes_outputs=True)
    add_unit_offset: bool | None = key(
        None,
        "Norms multiply by 1 + weight; None: the family's choice, which any value must equal.",
        changes_outputs=True,
    )
    qk_norm: bool | None = key(
        None, "Norm on each query and key head; None: the family's choice.", changes_outputs=True
    )
    clip_qkv: float | None = key(
        None, "Clamp elements of queries, keys and values to this absolute value.", gt=0, changes_outputs=True
    )
    norm_head: bool | None = key(
        None, "Normalise the rows of the head weight; None: the family's choice.", changes_outputs=True
    )
    apply_post_layer_norm: bool = later(
        False, "Norms after, not before, the blocks.", "post-norm", changes_outputs=True
    )

    # Biases and fused weights.
    no_bias: bool | None = key(
        None, "True: no linear layer has a bias; None: the family's choice.", changes_outputs=True
    )
    qkv_bias: bool | None = key(None, "Bias of query, key and value; None: the family's choice.", changes_outputs=True)
    o_bias: bool | None = key(None, "Bias of the attention's output; None: the family's choice.", changes_outputs=True)
    mlp_bias: bool | None = key(None, "Bias of the MLP; None: the family's choice.", changes_outputs=True)
    use_swiglu: bool | None = key(
        None,
        "Gated SiLU (True) or the family's other gate; None: the family's choice, which any value must equal.",
        changes_outputs=True,
    )
    enable_qkv_fusion: bool | None = key(
        None, "One weight for q, k and v; None: the family's choice.", changes_outputs=False
    )
    mlp_layer_fusion: bool | None = key(
        None, "One weight for both MLP inputs; None: the family's choice.", changes_outputs=False
    )

    # Positions and attention.
    max_position_embeddings: int = key(
        None,
        "Length in tokens that the model is meant for; with scaled positions that of pretraining, unless rope_scaling "
        "has it.",
        derived="2048, or data.seq_len if that is longer and positions are not scaled",
        ge=1,
        changes_outputs=True,
    )
    rope_base: float = key(10000.0, "Base of the rotary frequencies.", gt=0, changes_outputs=True)
    partial_rotary_factor: float | None = key(
        None,
        "Share of the channels of a head, the first ones, that rotate; None: the family's choice, usually all.",
        gt=0,
        le=1,
        changes_outputs=True,
    )
    rope_scaling: RopeScalingConfig | None = key(
        None, "dict(type, factor, ...): scaling of rotary positions.", changes_outputs=True
    )
    use_dynamic_ntk_rope: bool = key(False, "Dynamic NTK scaling beyond max_position_embeddings.", changes_outputs=True)
    use_fp32_rope: bool = key(True, "Compute rotary angles in float32.", changes_outputs=False)
    rotary_type: str = later(
        "native", "Kind of rotary embedding.", "rotary_type (use model.rope_scaling instead)", changes_outputs=True
    )
    qk_interleaved: bool = key(
        None,
        "Rotate neighbouring pairs (True) or the two halves of a head (False, as Hugging Face).",
        derived="not adapt_hf if that is given, else False",
        changes_outputs=True,
    )
    adapt_hf: bool | None = key(
        None, "Older spelling of `not qk_interleaved`; must agree with it.", changes_outputs=True
    )
    use_sliding_window: bool = key(False, "Attend to the last sliding_window tokens only.", changes_outputs=True)
    sliding_window: int | None = key(None, "Tokens of the window.", ge=1, changes_outputs=True)
    sliding_window_pattern: int | None = key(
        None,
        "Of so many consecutive layers, the last has full attention; None: the family's choice, usually no layer has.",
        ge=2,
        changes_outputs=True,
    )
    max_window_layers: int = key(
        0, "First layer with a window; earlier layers have full attention.", ge=0, changes_outputs=True
    )

    # Initialisation.
    init_type: Literal["normal", "uniform"] = key(
        "normal", "Distribution of the initial weights.", changes_outputs=False
    )
    use_scaled_init: bool = key(
        True, "Divide the standard deviation of output projections by sqrt(2 * num_layers).", changes_outputs=False
    )
    embedding_init_std: float = key(0.02, "Standard deviation of the embedding.", ge=0, changes_outputs=False)
    attn_wqkv_init_std: float = key(0.02, "Standard deviation of wq, wk and wv.", ge=0, changes_outputs=False)
    attn_other_init_std: float = key(0.02, "Standard deviation of wo.", ge=0, changes_outputs=False)
    ffn_uplayer_init_std: float = key(0.02, "Standard deviation of w1 and w3.", ge=0, changes_outputs=False)
    ffn_other_init_std: float = key(0.02, "Standard deviation of w2.", ge=0, changes_outputs=False)
    out_head_init_std: float = key(0.02, "Standard deviation of the head.", ge=0, changes_outputs=False)
    embed_grad_scale: float = key(1.0, "Factor on the gradient of the embedding.", ge=0, changes_outputs=False)

    # Multi-token prediction.
    num_nextn_predict_layers: int = key(
        0,
        "Layers behind the model that each predict one token further, in training (DeepSeek-V3's multi-token "
        "prediction).",
        ge=0,
        changes_outputs=False,
    )

    # Layout of the model over ranks.
    num_chunks: int = key(
        1,
        "Model chunks per pipeline stage; always 1 without a pipeline, 2 with the modes ZBV and DUALPIPEV.",
        ge=1,
        changes_outputs=False,
    )
    embed_split_hidden: bool = used_with(
        True,
        "Tensor ranks (except isp) split the embedding along the hidden (True) or vocabulary dimension (False); a tied "
        "one is split along the vocabulary, like the head.",
        "parallel.tensor.size",
        changes_outputs=False,
    )
    parallel_output: bool = no_effect(
        True, "Leave logits split over the vocabulary.", "the loss of split logits equals that of full ones"
    )
    dropout_selective_checkpoint: bool = no_effect(True, "Leave dropout out of recomputation.", "there is no dropout")
    device: Literal["cuda", "cpu", "meta"] = no_effect(
        "cuda", "Device to build the model on.", "models are built on the meta device, then materialized"
    )

    # Mixture of experts.
    num_experts: int = key(
        1, "Routed experts of a layer; 1: a dense model. See doc/moe.md.", ge=1, changes_outputs=True
    )
    top_k: int = used_with(1, "Experts per token.", "model.num_experts", ge=1, changes_outputs=True)
    num_shared_experts: int = used_with(
        0,
        "Experts that process every token, as one of so many times the width of a routed one.",
        "model.num_experts",
        ge=0,
        changes_outputs=True,
    )
    moe_type: Literal["GShard", "Dropless", "MegaBlock", "MegaBlock-Dropless", "MegaBlock-D"] = used_with(
        "GShard",
        "Kind of expert layer; GShard and MegaBlock drop tokens beyond a capacity (see doc/moe.md). Families that "
        "InternEvo lacks: Dropless.",
        "model.num_experts",
        changes_outputs=True,
    )
    moe_intermediate_size: int | None = used_with(
        None,
        "Width of a routed expert; None: that of the MLP, which otherwise is the width of dense layers.",
        "model.num_experts",
        ge=1,
        changes_outputs=True,
    )
    first_k_dense_replace: int = used_with(
        0, "The first layers, so many, have no experts.", "model.num_experts", ge=0, changes_outputs=True
    )
    mlp_only_layers: tuple[int, ...] = used_with(
        (), "Numbers of further layers without experts.", "model.num_experts", changes_outputs=True
    )
    moe_layer_kwargs: MoeLayerConfig = section(MoeLayerConfig, "Router and experts of a mixture.")
    hf_class: dict[str, Any] | None = key(
        None, "The class of `model_type = 'hf'` and its config; filled from `hf`.", changes_outputs=True
    )
    inject_info: InjectInfoConfig = section(InjectInfoConfig, "Exchange of layers of a foreign model.")

    # Further keys of InternEvo's models.
    attn_drop_rate: float = later(
        0.0, "Dropout rate of attention weights.", "dropout", ge=0, le=1, changes_outputs=True
    )
    drop_rate: float = later(0.0, "Dropout rate of the residual stream.", "dropout", ge=0, le=1, changes_outputs=True)
    use_glu: bool = later(True, "A gated MLP.", "an MLP without a gate", changes_outputs=True)
    rope_type: str = later(
        "normal",
        "InternEvo's QWEN2: kind of rotary embedding.",
        "rope_type (use model.rope_scaling instead)",
        changes_outputs=True,
    )
    rope_scaling_factor: float = later(
        1.0,
        "InternEvo's QWEN2: ratio of lengths.",
        "rope_scaling_factor (use model.rope_scaling instead)",
        changes_outputs=True,
    )
    scale_attn_weights: bool = no_effect(
        False,
        "InternEvo's QWEN2: leave the scale of attention to its kernel.",
        "both are 1 / sqrt(head_dim)",
    )
    use_logn_attn: bool = later(
        False, "InternEvo's QWEN2: scale queries by log n.", "log-n attention (Qwen 1)", changes_outputs=True
    )
    extra_pred_tokens: int = later(
        0,
        "Additional heads, each predicting a later token.",
        "extra_pred_tokens (use model.num_nextn_predict_layers instead)",
        ge=0,
        changes_outputs=True,
    )
    # Pictures, with model_type = "LLAVA".
    image_token_id: int | None = key(
        None,
        "Token that stands for a part of a picture, inside or outside of the vocabulary.",
        ge=0,
        changes_outputs=False,
    )
    vit_cfg: VisionTowerConfig | None = key(None, "The vision tower.", changes_outputs=True)
    vision_proj_cfg: VisionProjectorConfig | None = key(
        None, "Projection of the vision tower's outputs.", changes_outputs=True
    )

    @model_validator(mode="after")
    def _fill(self) -> ModelConfig:
        if self.qk_interleaved is None:
            self._derive(qk_interleaved=self.adapt_hf is False)
        if self.max_position_embeddings is None:
            self._derive(max_position_embeddings=_MAX_POSITIONS)
        return self

    @property
    def has_scaled_positions(self) -> bool:
        """Whether a kind of rope scaling is on."""
        return self.use_dynamic_ntk_rope or self.rope_scaling is not None

    @property
    def context_length(self) -> int | None:
        """Tokens of the longest sequence that the positions are meant for; None: any, with dynamic scaling."""
        scaling = self.rope_scaling
        if self.use_dynamic_ntk_rope or (scaling is not None and scaling.type == "dynamic"):
            return None
        if scaling is None:
            return self.max_position_embeddings
        original = scaling.original_max_position_embeddings or self.max_position_embeddings
        extended = round(original * scaling.factor)
        # Published Llama 3.1 is meant for twice the product: what its scaling does not reach, it was trained for.
        return max(extended, self.max_position_embeddings) if scaling.type == "llama3" else extended

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of weights and computation; torch.tf32 is float32 (see `uses_tf32`)."""
        import torch  # Imported here, so that reading or printing a config does not wait seconds for torch.

        return {
            "torch.bfloat16": torch.bfloat16,
            "torch.float16": torch.float16,
            "torch.half": torch.float16,
            "torch.float32": torch.float32,
            "torch.tf32": torch.float32,
            "torch.float64": torch.float64,
        }[self.dtype]

    @property
    def uses_tf32(self) -> bool:
        """Whether float32 GEMMs may use TensorFloat-32."""
        return self.dtype == "torch.tf32"

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads: num_kv_attention_heads, or the number of query heads."""
        return self.num_kv_attention_heads or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        """Channels of a query or key head."""
        if self.qk_nope_head_dim is not None and self.qk_rope_head_dim is not None:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_recomputed(self) -> int:
        """Number of recomputed layers of the whole model, counted from the first."""
        return int(self.num_layers * self.checkpoint)

    @property
    def ffn_size(self) -> int:
        """Width of the MLP: intermediate_size, or hidden_size * mlp_ratio rounded up to multiple_of."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return -(-int(self.hidden_size * self.mlp_ratio) // self.multiple_of) * self.multiple_of

    @property
    def expert_size(self) -> int:
        """Width of a routed expert: moe_intermediate_size, or that of the MLP."""
        return self.moe_intermediate_size or self.ffn_size

    @property
    def expert_size_key(self) -> str:
        """The key that gives `expert_size`."""
        if self.moe_intermediate_size:
            return "moe_intermediate_size"
        return "mlp_ratio" if self.intermediate_size is None else "intermediate_size"

    @property
    def dense_layers(self) -> frozenset[int]:
        """Numbers of the layers without experts."""
        if self.num_experts <= 1:
            return frozenset(range(self.num_layers))
        return frozenset((*range(self.first_k_dense_replace), *self.mlp_only_layers))

    @property
    def mlp_widths(self) -> dict[str, int]:
        """Key -> width of what tensor ranks split: the MLPs of dense layers, and a shared expert."""
        dense = "mlp_ratio" if self.intermediate_size is None else "intermediate_size"
        widths = {dense: self.ffn_size} if self.dense_layers else {}
        if self.num_experts > 1 and self.num_shared_experts:
            widths[self.expert_size_key] = self.expert_size
        return widths
