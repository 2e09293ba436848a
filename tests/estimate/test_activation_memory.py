"""What a layer keeps for backward in each mode and under each policy: bytes against the formulas of the pages
parallelism.md and memory.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.saved_activations import saved_by_model
from helpers.tiny import tiny_config

from internlm.core.context.layout import ParallelLayout
from internlm.estimate.activations import LayerActivations
from internlm.estimate.dimensions import ModelDimensions
from internlm.model.recompute import SAVE_POLICIES, SavePolicy
from internlm.model.registry import build_model

TOKENS = 64
HIDDEN, WIDTH, HEADS, HEAD_DIM = 64, 96, 4, 16
FLOAT = 4


def layout_of(mode: str | None, kv_heads: int) -> ParallelLayout:
    if mode is None:
        return ParallelLayout()
    return ParallelLayout(world_size=2, tensor=2, mode=mode, kv_replicas=2 if kv_heads < 2 and mode != "isp" else 1)  # type: ignore[arg-type]


def model_of(family: str, num_layers: int, keep: SavePolicy, changes: dict[str, Any]) -> Any:
    recomputing = {} if keep == "everything" else {"checkpoint": 1.0, "checkpoint_save_policy": keep}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_attention_heads": HEADS}
    with torch.device("meta"):
        return build_model(family, tiny_config(num_layers=num_layers, **sizes, **recomputing, **changes))


def kept_by_a_layer(layout: ParallelLayout, family: str, keep: SavePolicy, changes: dict[str, Any]) -> float:
    """Bytes a token that one layer more keeps: rotary tables and the ends of the model fall out."""
    three, two = (saved_by_model(model_of(family, layers, keep, changes), layout, TOKENS) for layers in (3, 2))
    return (three - two) / TOKENS


def formula(layout: ParallelLayout, family: str, keep: SavePolicy, changes: dict[str, Any]) -> float:
    """What the planner thinks."""
    dimensions = ModelDimensions.of(model_of(family, 2, "everything", changes).architecture)
    return LayerActivations(dimensions, layout, TOKENS, TOKENS).saved_bytes(keep) / TOKENS


@pytest.mark.parametrize("family", ["INTERNLM2", "LLAMA2"])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("mode", [None, "mtp", "msp", "fsp", "isp"])
def test_a_layer_keeps_what_the_formulas_say(mode: str | None, kv_heads: int, family: str, ranks: Any) -> None:
    t = 1 if mode is None else 2
    layout, changes = layout_of(mode, kv_heads), {"num_kv_attention_heads": kv_heads}
    kv = max(kv_heads, t)
    # isp keeps attention's output twice: as attention gave it, and as wo gets it behind the exchange.
    inner = ((3 if mode == "isp" else 2) * HEADS + 2 * kv) * HEAD_DIM + 3 * WIDTH
    # Beside what the formulas count: a number for each norm of a token, and one for each head of it in attention.
    residual, statistics = {
        None: (4 * HIDDEN, 2),
        "mtp": (4 * HIDDEN, 2),
        "msp": (2 * HIDDEN / t + 2 * HIDDEN, 2 / t),
        "fsp": (4 * HIDDEN / t, 2 / t),
        "isp": (4 * HIDDEN / t, 2 / t),
    }[mode]
    stream = HIDDEN if mode in (None, "mtp") else HIDDEN / t
    attention = HEADS * (HEAD_DIM + 1) / t
    projections = (HEADS + 2 * (kv_heads if mode == "isp" else kv)) * HEAD_DIM + 2 * WIDTH
    expected: dict[SavePolicy, float] = {
        "everything": residual + inner / t + statistics + HEADS / t,
        "matmuls": stream + attention + projections / t + 2 * HIDDEN / (t if mode == "isp" else 1),
        "attention": stream + attention,
        "nothing": stream,
    }
    for keep, elements in expected.items():
        assert formula(layout, family, keep, changes) == elements * FLOAT, keep
        for _ in range(5):
            kept = ranks(t).run(kept_by_a_layer, layout, family, keep, changes)
            if kept == [elements * FLOAT] * t:
                break
        else:
            pytest.fail(f"{keep}: {kept} bytes, not {elements * FLOAT}")


LATENT = {
    "num_kv_attention_heads": None,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"v_head_dim": 20}], ids=str)
@pytest.mark.parametrize("mode", [None, "mtp", "msp", "fsp", "isp"])
def test_the_planner_knows_latent_attention(mode: str | None, changes: dict[str, Any], ranks: Any) -> None:
    t, layout, keys = 1 if mode is None else 2, layout_of(mode, HEADS), {**LATENT, **changes}
    for keep in SAVE_POLICIES[: 2 if mode else 4]:
        planned = formula(layout, "DEEPSEEK_V2", keep, keys)
        for _ in range(5):
            kept = ranks(t).run(kept_by_a_layer, layout, "DEEPSEEK_V2", keep, keys)
            if kept == [planned] * t:
                break
        else:
            pytest.fail(f"{keep}: {kept} bytes, not {planned}")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("INTERNLM2", {"qk_norm": True}),
        ("LLAMA2", {"qk_norm": True}),
        ("LLAMA2", {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "mlp_layer_fusion": True}),
        ("INTERNLM2", {"norm_type": "layernorm"}),
        ("GEMMA", {"num_kv_attention_heads": 4}),
    ],
    ids=str,
)
@pytest.mark.parametrize("keep", SAVE_POLICIES)
def test_the_planner_knows_other_layers(family: str, changes: dict[str, Any], keep: SavePolicy) -> None:
    assert kept_by_a_layer(ParallelLayout(), family, keep, changes) == formula(ParallelLayout(), family, keep, changes)


@pytest.mark.parametrize("fp32_residual", [False, True])
@pytest.mark.parametrize("keep", SAVE_POLICIES)
def test_the_planner_knows_bf16(fp32_residual: bool, keep: SavePolicy) -> None:
    """But for the softmax's statistics, which CPU attention by blocks keeps none of."""
    changes = {"dtype": "torch.bfloat16", "residual_in_fp32": fp32_residual}
    planned = formula(ParallelLayout(), "INTERNLM2", keep, changes)
    missing = planned - kept_by_a_layer(ParallelLayout(), "INTERNLM2", keep, changes)
    assert missing in ((0,) if keep == "nothing" else (0, HEADS * FLOAT))
