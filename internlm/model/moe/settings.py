"""The expert layers of a model, resolved from the `model` section of a config."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from internlm.model.moe.router_form import RouterForm
from internlm.model.moe.selection import Selection, selection_of
from internlm.utils.errors import ConfigError

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig

SharedMix = Literal["sum", "sigmoid", "softmax"]
"""How the output of shared experts joins that of routed ones: added; added times the sigmoid of a linear gate (Qwen2,
https://arxiv.org/abs/2407.10671); both weighted by the softmax of a linear gate (InternEvo's residual MoE, after
https://arxiv.org/abs/2201.05596)."""


@dataclass(frozen=True)
class ExpertSettings:
    """The expert layers of a decoder.

    Attributes:
        form: of every router.
        width: intermediate size of a routed expert.
        shared_width: intermediate size of the shared experts together; 0: none.
        shared_mix: see `SharedMix`.
        dense_layers: numbers of the layers that have no experts.
        selection: capacity and noise of every router.
        has_biases: routers and routed experts have biases.
    """

    form: RouterForm
    width: int
    shared_width: int = 0
    shared_mix: SharedMix = "sum"
    dense_layers: frozenset[int] = frozenset()
    selection: Selection = field(default_factory=Selection)
    has_biases: bool = False

    def layers(self, num_layers: int) -> list[int]:
        """Numbers of the layers with experts."""
        return [layer for layer in range(num_layers) if layer not in self.dense_layers]


_KEYS = {
    "num_experts": "model.num_experts",
    "top_k": "model.top_k",
    "scale": "model.moe_layer_kwargs.routed_scaling_factor",
    "num_groups": "model.moe_layer_kwargs.n_group",
    "top_groups": "model.moe_layer_kwargs.topk_group",
    "group_score": "model.moe_layer_kwargs.group_score",
}
"""Field of `RouterForm` -> the key that it comes from."""

_KEY_OF_FIELD = re.compile(rf"\b({'|'.join(_KEYS)})\b")


def expert_settings(config: ModelConfig, shared_mix: SharedMix, has_biases: bool = False) -> ExpertSettings | None:
    """The expert layers that a config asks for; None for a dense model.

    Args:
        config: the `model` section.
        shared_mix, has_biases: of the family.

    Raises:
        ConfigError: the keys contradict each other.
    """
    if config.num_experts <= 1:
        return None
    keys, selection = config.moe_layer_kwargs, selection_of(config)
    try:
        form = RouterForm(
            num_experts=config.num_experts,
            top_k=config.top_k,
            scores=keys.scoring_func,
            normalizes=keys.normalize_expert_weights and selection.normalizes,
            scale=keys.routed_scaling_factor,
            has_bias=keys.selection_bias,
            num_groups=keys.n_group,
            top_groups=keys.topk_group if keys.n_group > 1 else 1,
            group_score=keys.group_score,
        )
    except ValueError as error:
        raise ConfigError(_KEY_OF_FIELD.sub(lambda field: _KEYS[field[0]], str(error))) from None
    dense = config.dense_layers
    if missing := sorted(set(config.mlp_only_layers) - set(range(config.num_layers))):
        raise ConfigError(
            f"model.mlp_only_layers = {list(config.mlp_only_layers)}: there is no layer {missing[0]}; layers are "
            f"numbered from 0 to model.num_layers - 1 = {config.num_layers - 1}"
        )
    if not dense < set(range(config.num_layers)):
        raise ConfigError(
            f"model.first_k_dense_replace = {config.first_k_dense_replace}, model.mlp_only_layers = "
            f"{list(config.mlp_only_layers)}: some of the {config.num_layers} layers (model.num_layers), from 0 on, "
            "must have experts"
        )
    # Without shared experts, families that would mix their output differently compute the same function.
    mix = shared_mix if config.num_shared_experts else "sum"
    shared_width = config.expert_size * config.num_shared_experts
    return ExpertSettings(form, config.expert_size, shared_width, mix, dense, selection, has_biases)
