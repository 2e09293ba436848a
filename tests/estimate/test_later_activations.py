"""What a layer that predicts a later token saves for backward: bytes against the estimate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.resume import Ranks
from helpers.saved_activations import saved_by_model
from helpers.tiny import tiny_config

from internlm.core.context.layout import ParallelLayout
from internlm.estimate.activations import LayerActivations
from internlm.estimate.dimensions import ModelDimensions
from internlm.model.moe.router import RouterLosses, routers_of
from internlm.model.recompute import SAVE_POLICIES, SavePolicy
from internlm.model.registry import build_model

TOKENS, HIDDEN, LAYERS = 64, 64, 2
EXPERTS = {"num_experts": 8, "top_k": 2, "moe_type": "Dropless"}


def model_of(family: str, num_later: int, policy: SavePolicy, changes: dict[str, Any]) -> Any:
    recomputing = {} if policy == "everything" else {"checkpoint": 1.0, "checkpoint_save_policy": policy}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_layers": LAYERS}
    with torch.device("meta"):
        return build_model(family, tiny_config(**sizes, **recomputing, **changes, num_nextn_predict_layers=num_later))


def begin_step(model: Any) -> None:
    for router in routers_of([model]):
        router.begin_step(RouterLosses(balance=0.1, z=0.1), torch.ones(()))


def saved_by_a_layer(layout: ParallelLayout, family: str, policy: SavePolicy, changes: dict[str, Any]) -> float:
    """Bytes that one such layer more saves, without its part of the model's output."""
    models = [model_of(family, number, policy, changes) for number in (3, 2)]
    three, two = (saved_by_model(model, layout, TOKENS, begin_step) for model in models)
    a = models[0].architecture
    own_tokens = TOKENS / layout.context / (1 if layout.mode == "mtp" else layout.tensor)
    return three - two - own_tokens * HIDDEN * a.dtype.itemsize


def estimate(layout: ParallelLayout, family: str, policy: SavePolicy, changes: dict[str, Any]) -> float:
    dimensions = ModelDimensions.of(model_of(family, 2, "everything", changes).architecture)
    return LayerActivations(dimensions, layout, TOKENS // layout.context, TOKENS).of(LAYERS).saved_bytes(policy)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("INTERNLM2", {}),
        ("INTERNLM2", {"norm_type": "layernorm"}),
        ("LLAMA2", {"dtype": "torch.bfloat16", "residual_in_fp32": True}),
        ("QWEN3MOE", EXPERTS),
        ("QWEN3MOE", {**EXPERTS, "mlp_only_layers": [1]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", SAVE_POLICIES)
def test_a_layer_saves_what_is_estimated(family: str, changes: dict[str, Any], policy: SavePolicy) -> None:
    layout = ParallelLayout()
    assert saved_by_a_layer(layout, family, policy, changes) == estimate(layout, family, policy, changes)


@pytest.mark.parametrize(
    "axes", [*({"tensor": 2, "mode": mode} for mode in ("mtp", "msp", "fsp", "isp")), {"context": 2}], ids=str
)
def test_ranks_save_what_is_estimated(axes: dict[str, Any], ranks: Ranks) -> None:
    layout = ParallelLayout(world_size=2, **axes)
    for policy in SAVE_POLICIES:
        estimated = estimate(layout, "INTERNLM2", policy, {})
        for _ in range(5):
            saved = ranks(2).run(saved_by_a_layer, layout, "INTERNLM2", policy, {})
            if saved == [estimated] * 2:
                break
        else:
            pytest.fail(f"{policy}: {saved} bytes, not {estimated}")
