"""Contradictions among the keys of a router are named by these keys."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.configs import small_config

from internlm.model.architecture import Architecture
from internlm.model.moe.settings import expert_settings
from internlm.utils.errors import ConfigError

MOE = {"model_type": "QWEN3MOE", "model.num_experts": 8, "model.top_k": 2, "model.moe_type": "Dropless"}


@pytest.mark.parametrize("keys", [{"first_k_dense_replace": 2}, {"mlp_only_layers": (0, 1)}])
def test_some_layer_must_have_experts(keys: dict[str, Any]) -> None:
    config = small_config(
        {**MOE, "model.num_layers": 2, **{f"model.{key}": value for key, value in keys.items()}}
    ).model
    with pytest.raises(ConfigError, match=r"some of the 2 layers .* must have experts"):
        expert_settings(config, "sigmoid")


@pytest.mark.parametrize("layers", [(2,), (-1,), (0, 2)])
def test_dense_layers_must_exist(layers: tuple[int, ...]) -> None:
    config = small_config({**MOE, "model.num_layers": 2, "model.mlp_only_layers": layers}).model
    with pytest.raises(ConfigError, match=r"model.mlp_only_layers = .*: there is no layer (2|-1); layers are numbered"):
        expert_settings(config, "sigmoid")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_group": 3}, "model.moe_layer_kwargs.n_group = 3 must divide model.num_experts = 8"),
        (
            {"n_group": 4, "topk_group": 5},
            "model.moe_layer_kwargs.topk_group = 5 must be at most model.moe_layer_kwargs.n_group = 4",
        ),
        (
            {"n_group": 8, "topk_group": 4, "group_score": "top2_sum"},
            "model.moe_layer_kwargs.n_group = 8 must be at most 4, half of model.num_experts: "
            "model.moe_layer_kwargs.group_score = 'top2_sum' needs groups of at least 2 experts",
        ),
        (
            {"n_group": 8},
            "model.moe_layer_kwargs.topk_group = 1 must be at least 2: groups of 1 experts have to "
            "provide model.top_k = 2",
        ),
    ],
    ids=str,
)
def test_contradictions(keys: dict[str, Any], message: str) -> None:
    config = small_config({**MOE, "model.moe_layer_kwargs": keys}).model
    with pytest.raises(ConfigError) as error:
        expert_settings(config, "sigmoid")
    assert str(error.value) == message


def test_equal_configs_give_equal_architectures() -> None:
    models = [small_config({**MOE}).model for _ in range(2)]
    one, other = (Architecture.resolve(config, shared_mix="sigmoid") for config in models)
    assert one == other
    assert one != Architecture.resolve(models[0].model_copy(update={"mlp_only_layers": (0,)}), shared_mix="sigmoid")
