"""What a layer with experts keeps for backward: bytes against the estimate, with balance losses and their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.resume import Ranks
from helpers.saved_activations import saved_by_model
from helpers.tiny import tiny_config

from internlm.core.context.layout import ParallelLayout
from internlm.estimate.activations import LayerActivations
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.expert_layers import RoutedTokens
from internlm.model.moe.router import RouterLosses, routers_of
from internlm.model.recompute import SAVE_POLICIES, SavePolicy
from internlm.model.registry import build_model

TOKENS = 64


def model_of(family: str, num_layers: int, policy: SavePolicy, changes: dict[str, Any]) -> Any:
    recomputing = {} if policy == "everything" else {"checkpoint": 1.0, "checkpoint_save_policy": policy}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_experts": 8, "top_k": 2}
    options = {**sizes, "moe_type": "Dropless", **recomputing, **changes}
    with torch.device("meta"):
        return build_model(family, tiny_config(num_layers=num_layers, **options))


def begin_step(model: Any) -> None:
    for router in routers_of([model]):
        router.begin_step(RouterLosses(balance=0.1, z=0.1), torch.ones(()))


def kept_by_a_layer(layout: ParallelLayout, family: str, policy: SavePolicy, changes: dict[str, Any]) -> int:
    """Bytes that one layer more keeps."""
    three, two = (
        saved_by_model(model_of(family, layers, policy, changes), layout, TOKENS, begin_step) for layers in (3, 2)
    )
    return three - two


def formula(layout: ParallelLayout, family: str, changes: dict[str, Any]) -> LayerActivations:
    dimensions = ModelDimensions.of(model_of(family, 2, "everything", changes).architecture)
    return LayerActivations(dimensions, layout, TOKENS, TOKENS)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("QWEN3MOE", {}),
        ("QWEN3MOE", {"dtype": "torch.bfloat16"}),
        ("QWEN2MOE", {"num_shared_experts": 1}),
        ("QWEN2MOE", {"num_shared_experts": 1, "dtype": "torch.bfloat16", "residual_in_fp32": True}),
        ("MIXTRALMOE", {"num_shared_experts": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", SAVE_POLICIES)
def test_a_layer_keeps_what_is_estimated(family: str, changes: dict[str, Any], policy: SavePolicy) -> None:
    estimated = formula(ParallelLayout(), family, changes).of(0).saved_bytes(policy)
    assert kept_by_a_layer(ParallelLayout(), family, policy, changes) == estimated


@pytest.mark.parametrize(
    ("axes", "shared"),
    [
        ({"expert": 2}, 0),
        ({"expert": 2, "tensor": 2, "mode": "mtp"}, 1),
        ({"expert": 2, "tensor": 2, "mode": "isp"}, 1),
        ({"expert_inner": 2, "tensor": 2, "mode": "msp"}, 1),
    ],
    ids=str,
)
def test_ranks_keep_what_is_estimated(axes: dict[str, Any], shared: int, ranks: Ranks) -> None:
    """Together: a rank computes the rows that choose its experts."""
    layout, changes = ParallelLayout(world_size=2, **axes), {"num_shared_experts": shared}
    for policy in SAVE_POLICIES:
        estimated = 2 * formula(layout, "QWEN2MOE", changes).of(0).saved_bytes(policy)
        for _ in range(5):
            kept = sum(ranks(2).run(kept_by_a_layer, layout, "QWEN2MOE", policy, changes))
            if kept == estimated:
                break
        else:
            pytest.fail(f"{policy}: {kept} bytes, not {estimated}")


def test_the_worst_case_is_all_tokens_on_one_rank() -> None:
    layout = ParallelLayout(world_size=4, expert=4)
    activations = formula(layout, "QWEN3MOE", {})
    routed = RoutedTokens.of(activations.dimensions, layout, TOKENS)
    assert (routed.tokens, routed.rows, routed.most_rows) == (TOKENS, 2 * TOKENS, 4 * 2 * TOKENS)
    # The input, gate, up and the input of w2, in fp32, and two orders.
    per_row = (64 + 3 * 96) * 4 + 16
    worst = replace(activations, is_worst=True).of(0).saved_bytes("everything")
    assert worst - activations.of(0).saved_bytes("everything") == 6 * TOKENS * per_row


def test_dense_layers_of_a_mixture_are_dense() -> None:
    activations = formula(ParallelLayout(), "QWEN3MOE", {"mlp_only_layers": [0]})
    dense = formula(ParallelLayout(), "QWEN3", {"num_experts": 1, "top_k": 1})
    for policy in SAVE_POLICIES:
        assert activations.of(0).saved_bytes(policy) == dense.of(0).saved_bytes(policy)
        assert activations.of(1).saved_bytes(policy) > dense.of(0).saved_bytes(policy)
