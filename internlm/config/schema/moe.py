"""Mixtures of experts: the section `model.moe_layer_kwargs`, and the `moe` section."""

from __future__ import annotations

from typing import Literal

from internlm.config.schema.base import PathText, Section, no_effect, section, used_with

_FIXED_ORDER = "the order of every sum is fixed, whatever the kernel"


class MoeLayerConfig(Section):
    """Router and experts of a mixture; see doc/moe.md."""

    scoring_func: Literal["softmax", "sigmoid"] = used_with(
        "softmax", "Scores of experts from the logits of the router.", "model.num_experts", changes_outputs=True
    )
    normalize_expert_weights: bool = used_with(
        True, "Divide the weights of a token's experts by their sum.", "model.num_experts", changes_outputs=True
    )
    routed_scaling_factor: float = used_with(
        1.0, "Factor on these weights.", "model.num_experts", gt=0, changes_outputs=True
    )
    n_group: int = used_with(1, "Groups of consecutive experts.", "model.num_experts", ge=1, changes_outputs=True)
    topk_group: int = used_with(
        1, "Groups that a token may choose experts from.", "model.moe_layer_kwargs.n_group", ge=1, changes_outputs=True
    )
    group_score: Literal["max", "top2_sum"] = used_with(
        "max",
        "What ranks groups: their best score, or the sum of the two best.",
        "model.moe_layer_kwargs.n_group",
        changes_outputs=True,
    )

    selection_bias: bool = used_with(
        False,
        "Add a bias per expert to its score for the choice alone; see loss.moe_bias_update_rate.",
        "model.num_experts",
        changes_outputs=True,
    )

    # Further keys of InternEvo's layers.
    capacity_factor: float | None = used_with(
        None,
        "Tokens of a sample that an expert takes, over those at perfect balance; None: 1 for GShard and MegaBlock, no "
        "limit for Dropless.",
        "model.num_experts",
        gt=0,
        changes_outputs=True,
    )
    eval_capacity_factor: float | None = used_with(
        None,
        "The same in evaluation; None: 1 for GShard, else capacity_factor.",
        "model.num_experts",
        gt=0,
        changes_outputs=True,
    )
    min_capacity: int | None = used_with(
        None,
        "Tokens that an expert takes at least; None: 4 for GShard, else 0.",
        "model.num_experts",
        ge=0,
        changes_outputs=True,
    )
    drop_tokens: bool | None = used_with(
        None,
        "False: no expert has a capacity; None: as model.moe_type and capacity_factor have it.",
        "model.num_experts",
        changes_outputs=True,
    )
    drop_and_pad: bool = no_effect(
        False, "Give every expert as many rows.", "rows beyond the capacity are left out, and none are added"
    )
    drop_policy: Literal["probs", "position"] = used_with(
        "probs",
        "Dropless: the tokens that an expert keeps, those with the largest weights or the first.",
        "model.moe_layer_kwargs.capacity_factor",
        changes_outputs=True,
    )
    use_rts: bool = used_with(
        True,
        "GShard with top_k = 1, without use_fused_gating: an expert keeps random tokens, not the first.",
        "model.num_experts",
        changes_outputs=True,
    )
    use_fused_gating: bool = used_with(
        True,
        "GShard with top_k = 1 or 2: choose and weight as with larger top_k (see doc/moe.md).",
        "model.num_experts",
        changes_outputs=True,
    )
    noisy_gate_policy: Literal["Jitter", "RSample", "None"] | None = used_with(
        None,
        "Noise in training: Jitter, factors of 0.99 to 1.01 on the input of the router; RSample, Gumbel noise on the "
        "logits by which experts are chosen.",
        "model.num_experts",
        changes_outputs=False,
    )
    aux_loss_by_layer: bool = no_effect(
        True, "One load-balancing loss for each layer.", "every layer has its own load-balancing loss"
    )
    token_dispatch_policy: Literal["alltoall", "allgather"] = no_effect(
        "alltoall", "How tokens reach experts of other ranks.", "tokens are always exchanged by all-to-all"
    )
    use_grouped_mlp: bool = no_effect(True, "One GEMM for all experts.", "the experts of a rank are computed together")
    enable_fused_permute: bool = no_effect(True, "A fused permutation.", _FIXED_ORDER)
    deterministic_mode: bool = no_effect(False, "Deterministic kernels.", _FIXED_ORDER)


class MoeReplayConfig(Section):
    """Chosen experts in files, so that runs are compared at equal routing; see doc/moe.md."""

    write: PathText = used_with(
        None, "Local folder to which the experts of every token are written in each training step.", "model.num_experts"
    )
    read: PathText = used_with(
        None,
        "Local folder from which they are read; the routers' own choice is ignored in training.",
        "model.num_experts",
    )


class MoeConfig(Section):
    """Tools for mixtures of experts. Their sizes and routers are keys of `model`."""

    replay: MoeReplayConfig = section(MoeReplayConfig, "Chosen experts in files.")
