"""The expert layers of a model, resolved from the `model` section of a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from internlm.model.moe.router_form import RouterForm
from internlm.utils.errors import ConfigError, nearest

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig

SharedMix = Literal["sum", "sigmoid", "softmax"]
"""How the output of shared experts joins that of routed ones: added; added times the sigmoid of a linear gate (Qwen2,
https://arxiv.org/abs/2407.10671); both weighted by the softmax of a linear gate (InternEvo's residual MoE, after
https://arxiv.org/abs/2201.05596)."""


@dataclass(frozen=True)
class ExpertSettings:
    """The expert layers of a decoder: all of its layers.

    Attributes:
        form: of every router.
        width: intermediate size of a routed expert.
        shared_width: intermediate size of the shared experts together; 0: none.
        shared_mix: see `SharedMix`.
    """

    form: RouterForm
    width: int
    shared_width: int = 0
    shared_mix: SharedMix = "sum"


_NO_EFFECT = {
    "enable_fused_permute": "tokens are always permuted in one pass",
    "token_dispatch_policy": "every rank holds all experts",
    "use_grouped_mlp": "the experts of a layer are always computed together",
    "deterministic_mode": "the order of every sum is fixed",
    "use_fused_gating": "there is one implementation of the router",
}
"""Keys of `model.moe_layer_kwargs` that change no result, with the reason."""

_ONLY_VALUE: Mapping[str, tuple[Any, ...]] = {
    "drop_and_pad": (False,),
    "capacity_factor": (None,),
    "eval_capacity_factor": (None,),
    "min_capacity": (None,),
    "drop_policy": ("probs",),
    "drop_tokens": (False,),
    "use_rts": (False,),
    "noisy_gate_policy": (None, "None"),
    "aux_loss_by_layer": (True,),
}
"""Keys of features that are not supported yet: a capacity, and noise; with the values that mean that they are off."""

_ROUTER_KEYS: Mapping[str, tuple[str, type | tuple[type, ...]]] = {
    "scoring_func": ("scores", str),
    "normalize_expert_weights": ("normalizes", bool),
    "routed_scaling_factor": ("scale", (int, float)),
    "n_group": ("num_groups", int),
    "topk_group": ("top_groups", int),
    "group_score": ("group_score", str),
}
"""Keys of `model.moe_layer_kwargs` -> the field of `RouterForm`, and its type."""


def expert_settings(config: ModelConfig, shared_mix: SharedMix) -> ExpertSettings | None:
    """The expert layers that a config asks for; None for a dense model.

    Args:
        config: the `model` section.
        shared_mix: of the family.

    Raises:
        ConfigError: every key that is unknown, not supported, or contradicts another.
    """
    if config.num_experts <= 1:
        return None
    mistakes: list[str] = []
    known = [*_ROUTER_KEYS, *_ONLY_VALUE, *_NO_EFFECT]
    fields: dict[str, Any] = {"normalizes": True}
    for name, value in config.moe_layer_kwargs.items():
        path = f"model.moe_layer_kwargs.{name}"
        if name in _ROUTER_KEYS:
            field, kind = _ROUTER_KEYS[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                mistakes.append(f"{path} = {value!r} must be of type {' or '.join(k.__name__ for k in kinds)}")
            else:
                fields[field] = value
        elif name in _ONLY_VALUE:
            if value not in _ONLY_VALUE[name]:
                mistakes.append(
                    f"{path} = {value!r}: capacity, dropping and noise of experts are not yet supported; leave the key out"
                )
        elif name not in _NO_EFFECT:
            mistakes.append(f"{path} is not a known key. Known: {', '.join(known)}.{nearest(name, known)}")
    if mistakes:
        raise ConfigError(mistakes)
    try:
        form = RouterForm(num_experts=config.num_experts, top_k=config.top_k, **fields)
    except ValueError as error:
        raise ConfigError(f"model.num_experts, model.top_k, model.moe_layer_kwargs: {error}") from None
    # Without shared experts, families that would mix their output differently compute the same function.
    mix = shared_mix if config.num_shared_experts else "sum"
    return ExpertSettings(form, config.ffn_size, config.ffn_size * config.num_shared_experts, mix)


def keys_without_effect(config: ModelConfig) -> dict[str, str]:
    """The keys of `model.moe_layer_kwargs` that a config sets and that change nothing -> the reason."""
    return {
        f"model.moe_layer_kwargs.{name}": _NO_EFFECT[name] for name in config.moe_layer_kwargs if name in _NO_EFFECT
    }
