"""What a config of a mixture of experts means, where its user may not expect it."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.configs import small_config

from internlm.config.notices import find_notices

MOE = {"model_type": "MIXTRALMOE", "model.num_experts": 8, "model.top_k": 2, "model.moe_type": "Dropless"}

RANDOM = {"use_fused_gating": False, "noisy_gate_policy": "RSample"}


@pytest.mark.parametrize(
    ("changes", "world_size", "begins"),
    [
        ({}, 1, []),
        ({}, 4, ["parallel.expert.size = -1: the 8 experts of a layer are dealt to 4 of 4 rank(s)"]),
        (
            {"parallel.pipeline.size": 2},
            12,
            ["parallel.expert.size = -1: the 8 experts of a layer are dealt to 2 of 12"],
        ),
        (
            {"parallel.fsdp.enable": True},
            4,
            ["parallel.expert.size = -1: the 8 experts of a layer are dealt to 1 of 4"],
        ),
        ({"parallel.expert.size": 2}, 4, []),
        ({"model.num_experts": 1, "model.top_k": 1}, 4, []),
        ({"loss.moe_loss_coeff": 0.0}, 1, ["loss.moe_loss_coeff = 0: nothing balances"]),
        (
            {"model.num_nextn_predict_layers": 1, "loss.multi_token_loss_coeff": 0.0},
            1,
            ["model.num_nextn_predict_layers = 1 with loss.multi_token_loss_coeff = 0: these layers are not trained"],
        ),
        (
            {"model.moe_layer_kwargs": {"selection_bias": True}},
            1,
            ["model.moe_layer_kwargs.selection_bias = True with loss.moe_bias_update_rate = 0"],
        ),
        (
            {
                "model.moe_layer_kwargs": {"selection_bias": True},
                "loss.moe_bias_update_rate": 1e-3,
                "loss.moe_loss_coeff": 0.0,
            },
            1,
            [],
        ),
        (
            {"model_type": "DEEPSEEK_V2"},
            1,
            ["model_type = 'DEEPSEEK_V2' with model.moe_layer_kwargs.normalize_expert_weights = True"],
        ),
        ({"model_type": "DEEPSEEK_V2", "model.moe_layer_kwargs": {"normalize_expert_weights": False}}, 1, []),
        ({"model.top_k": 1}, 1, ["model.top_k = 1 with model.moe_layer_kwargs.normalize_expert_weights"]),
        ({"model.top_k": 1, "model.moe_layer_kwargs": {"normalize_expert_weights": False}}, 1, []),
        ({"float8.enable_float8_linear": True}, 1, []),
        ({"moe.replay.write": "routing"}, 1, []),
        ({"moe.replay.read": "routing"}, 1, ["moe.replay.read = 'routing': training takes the experts of every token"]),
        (
            {"model.moe_type": "GShard"},
            1,
            ["model.moe_type = 'GShard': an expert takes 1.0 * top_k / num_experts of the tokens of a sample, 4 or"],
        ),
        ({"model.moe_type": "GShard", "model.moe_layer_kwargs": {"drop_tokens": False}}, 1, []),
        (
            {"model.moe_layer_kwargs": {"drop_tokens": False, "capacity_factor": 2.0}},
            1,
            ["no effect: model.moe_layer_kwargs.capacity_factor (model.moe_layer_kwargs.drop_tokens = False)"],
        ),
        (
            {"model.moe_layer_kwargs": {"use_rts": True, "use_fused_gating": False}},
            1,
            [
                "no effect: model.moe_layer_kwargs.use_fused_gating = False (",
                "no effect: model.moe_layer_kwargs.use_rts = True (",
            ],
        ),
        (
            {"model.moe_type": "GShard", "model.moe_layer_kwargs": RANDOM},
            1,
            ["model.moe_type = 'GShard': an expert takes", "no effect: model.moe_layer_kwargs.noisy_gate_policy = 'RS"],
        ),
        ({"model.compile": True}, 1, []),
        (
            {"model.compile": True},
            2,
            ["parallel.expert.size = -1: the ", "model.compile = True: routers and routed experts are not co"],
        ),
        ({"model_type": "KIMI_K2"}, 1, ["model_type = 'KIMI_K2' with model.moe_layer_kwargs.scoring_func = 'softmax'"]),
    ],
    ids=str,
)
def test_notices(changes: dict[str, Any], world_size: int, begins: list[str]) -> None:
    def told(keys: dict[str, Any]) -> list[str]:
        given = {f"{path}.{name}" for path, value in keys.items() if isinstance(value, dict) for name in value}
        return list(find_notices(small_config(keys), lambda path: True if path in given else None, world_size))

    dense = {
        key: value for key, value in changes.items() if not key.startswith(("model.top_k", "model.moe", "loss", "moe."))
    }
    others = told({**dense, "model.num_experts": 1})
    found = [line for line in told({**MOE, **changes}) if line not in others]
    assert len(found) == len(begins), found
    assert all(line.startswith(begin) for line, begin in zip(found, begins, strict=True))


@pytest.mark.parametrize(
    ("model_type", "moe_type"), [("MIXTRALMOE", "GShard"), ("QWEN3MOE", "GShard"), ("DEEPSEEK_V3", "Dropless")]
)
def test_the_default_kind_of_layers_is_that_of_internevo_for_its_own_models(model_type: str, moe_type: str) -> None:
    keys = {"model_type": model_type, "model.num_experts": 8, "model.top_k": 2}
    assert small_config(keys).model.moe_type == moe_type
    assert small_config({**keys, "model.moe_type": "MegaBlock"}).model.moe_type == "MegaBlock"
    assert small_config({**keys, "model.num_experts": 1}).model.moe_type == "GShard"
