"""Latent attention: heads of two widths, generation with a cache of latent vectors, and contradictions of keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.model import LATENT, tiny_config, tiny_model

from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.registry import build_model
from internlm.utils.errors import ConfigError


@pytest.mark.parametrize("value_dim", [5, 12, 17])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_heads_of_two_widths(value_dim: int, scale: float | None) -> None:
    q, k, v = (torch.randn(1, 9, 2, width, dtype=torch.float64) for width in (12, 12, value_dim))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (12**-0.5 if scale is None else scale)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[5:, :5] = False
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
    inner = InnerAttention(None, "auto", True, scale)
    varlen = VarlenMetadata.of((5, 4))
    torch.testing.assert_close(inner(q, k, v, varlen), expected, rtol=0, atol=1e-12)
    with_lse, lse = inner.forward_with_lse(q, k, v, varlen)
    torch.testing.assert_close(with_lse, expected, rtol=0, atol=1e-12)
    assert lse.shape == (1, 9, 2)


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "sliding_window": 4, "use_sliding_window": True}])
def test_a_cache_holds_latent_vectors(changes: dict[str, Any]) -> None:
    model = tiny_model("DEEPSEEK_V3", **{**LATENT, **changes})
    ids, positions = torch.arange(22).view(2, 11), torch.arange(11).expand(2, -1)
    cache = model.make_cache(2, 16)
    assert cache.keys.shape[-2:] == (1, 12) and cache.values.shape[-2:] == (1, 4)
    with torch.no_grad():
        expected = model(ids, positions)
        parts = [
            model(ids[:, part], positions[:, part], cache=cache.rows())
            for part in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 11))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("DEEPSEEK_V3", {"kv_lora_rank": None}, "model.kv_lora_rank: latent attention needs it"),
        ("DEEPSEEK_V2", {"num_kv_attention_heads": 2}, "as many key-value heads as query heads"),
        ("DEEPSEEK_V2", {"head_dim": 12}, "model.head_dim = 12: latent attention does not support it"),
        ("DEEPSEEK_V2", {"qkv_bias": True}, "model.qkv_bias = True: latent attention does not support it"),
        ("DEEPSEEK_V2", {"no_bias": False}, "model.no_bias = False: latent attention does not support it"),
        ("KIMI_K2", {"enable_qkv_fusion": True}, "model.enable_qkv_fusion = True: latent attention does not"),
        ("KIMI_K2", {"qk_rope_head_dim": 3}, "model.qk_rope_head_dim = 3 must be even"),
        ("LLAMA2", {}, "model.kv_lora_rank = 12: this model_type has no latent attention"),
    ],
)
def test_contradictions(model_type: str, changes: dict[str, Any], reason: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=reason):
        build_model(model_type, tiny_config(**{**LATENT, **changes}))


def test_values_that_ask_for_what_it_is_are_accepted() -> None:
    tiny_model("DEEPSEEK_V2", **LATENT, no_bias=True, qkv_bias=False, o_bias=False, qk_norm=False)


def test_mscale_needs_latent_attention() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    with torch.device("meta"), pytest.raises(ConfigError, match="mscale_all_dim: only for latent attention"):
        build_model("LLAMA2", tiny_config(rope_scaling=scaling))
    with torch.device("meta"):
        rope = build_model("DEEPSEEK_V3", tiny_config(**LATENT, rope_scaling=scaling)).architecture.rope  # type: ignore[union-attr]
    assert rope.attention_factor == 1.0 and rope.score_factor == pytest.approx((0.1 * 1.3862944 + 1) ** 2)


@pytest.mark.parametrize(("mscale", "of_all"), [(1.0, 0.5), (0.707, 0.707), (1.0, 0.0)])
def test_temperatures_of_yarn_are_those_of_transformers(mscale: float, of_all: float) -> None:
    """Without `attention_factor`, which imported configs have."""
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"factor": 4.0, "mscale": mscale, "mscale_all_dim": of_all}
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 2048, **scaling}
    peer = DeepseekV3Config(qk_rope_head_dim=LATENT["qk_rope_head_dim"], rope_parameters=rope)
    with torch.device("meta"):
        model = build_model("DEEPSEEK_V3", tiny_config(**LATENT, rope_scaling={"type": "yarn", **scaling}))
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](peer, torch.device("cpu"))
    assert model.architecture.rope.attention_factor == pytest.approx(expected)  # type: ignore[union-attr]
