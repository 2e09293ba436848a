"""What a class of transformers for mixtures of experts needs for translation in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internlm.model.architecture import Architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from internlm.model.moe.router_form import RouterForm


@dataclass(frozen=True)
class MixtureClass:
    """A class of transformers.

    Attributes:
        model_type: of this package.
        class_name: of its config.
        keys: (config, refused) -> the keys of the `model` section that describe experts, and attention where it is
            unlike that of other families. Appends the name of each feature that is not supported to `refused`.
        refused: architecture -> reasons why the class does not compute it, and whether they apply.
        config: (architecture, keys of every config) -> the config.
        own_keys: further keys of a config.json that `keys` uses, or that concern training only.
    """

    model_type: str
    class_name: str
    keys: Callable[[PretrainedConfig, list[str]], dict[str, Any]]
    refused: Callable[[Architecture], dict[str, bool]]
    config: Callable[[Architecture, Mapping[str, Any]], PretrainedConfig]
    own_keys: tuple[str, ...] = ()


def softmax_routing(normalizes: bool) -> dict[str, Any]:
    """`moe_layer_kwargs` of a class whose routers have plain softmax scores."""
    return {"normalize_expert_weights": normalizes, "scoring_func": "softmax", "routed_scaling_factor": 1.0}


def unlike_softmax_routing(form: RouterForm) -> dict[str, bool]:
    """Reasons why a class whose routers have plain softmax scores does not compute a router -> whether they apply."""
    return {
        f"scoring_func '{form.scores}'": form.scores != "softmax",
        "routed_scaling_factor other than 1": form.scale != 1.0,
        "a selection bias of the router": form.has_bias,
        "groups of experts": form.num_groups > 1,
    }


def layer_sizes(num_layers: int, dense: list[int], mlp: int, expert: int, refused: list[str]) -> dict[str, Any]:
    """The keys of the `model` section for layers with and without experts.

    Args:
        num_layers: of the model.
        dense: numbers of the layers without experts, in order.
        mlp: width of dense layers.
        expert: width of an expert.
        refused: receives a line if no layer has experts.
    """
    if len(dense) == num_layers:
        refused.append(f"no layer with experts, of {num_layers} layers")
    if not dense:
        return {"intermediate_size": expert}
    first = next(layer for layer in range(num_layers + 1) if layer not in dense)
    return {
        "intermediate_size": mlp,
        "moe_intermediate_size": expert,
        "first_k_dense_replace": first,
        "mlp_only_layers": tuple(layer for layer in dense if layer >= first),
    }


def rotary_factor(architecture: Architecture) -> float:
    """The share of a head's channels that rotate, as `partial_rotary_factor`."""
    rotated, head_dim = architecture.rope.head_dim, architecture.head_dim
    factor = rotated / head_dim
    while int(head_dim * factor) < rotated:
        factor = math.nextafter(factor, 1.0)
    return factor
