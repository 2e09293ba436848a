"""What a layer saves for backward where context ranks share a sample: bytes against the estimate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.resume import Ranks
from helpers.saved_activations import saved_by_model
from helpers.tiny import tiny_config

from internlm.core.context.layout import ParallelLayout
from internlm.core.parallel.context.split_batch import ContextOptions
from internlm.core.parallel.context.token_cut import CutName
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.estimate.activations import LayerActivations
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.training_step import gathered_keys
from internlm.model.recompute import SAVE_POLICIES, SavePolicy
from internlm.model.registry import build_model

TOKENS = 72
LATENT = {
    "num_kv_attention_heads": None, "q_lora_rank": 40, "kv_lora_rank": 24, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


def model_of(family: str, num_layers: int, policy: SavePolicy, changes: dict[str, Any]) -> Any:
    recomputing = {} if policy == "everything" else {"checkpoint": 1.0, "checkpoint_save_policy": policy}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    with torch.device("meta"):
        return build_model(family, tiny_config(num_layers=num_layers, **sizes, **recomputing, **changes))


def saved_and_estimated(
    layout: ParallelLayout, family: str, policy: SavePolicy, changes: dict[str, Any], cut: CutName
) -> tuple[float, float]:
    """Bytes that one layer more saves on this rank, and the estimate."""
    options = ParallelOptions(context=ContextOptions(cut))
    three, two = (
        saved_by_model(model_of(family, layers, policy, changes), layout, TOKENS, options=options) for layers in (3, 2)
    )
    dimensions = ModelDimensions.of(model_of(family, 2, "everything", changes).architecture)
    rank = layout.activation.coordinate(dist.get_rank())["context"]
    keys = gathered_keys(layout, dimensions, options.context, (TOKENS,), rank)
    layer = LayerActivations(dimensions, layout, TOKENS // layout.context, TOKENS, keys)
    return three - two, layer.of(0).saved_bytes(policy)


@pytest.mark.parametrize(
    ("family", "changes", "axes", "cut"),
    [
        ("INTERNLM2", {"num_kv_attention_heads": 2}, {}, "zigzag"),
        ("DEEPSEEK_V2", LATENT, {}, "contiguous"),
        ("DEEPSEEK_V2", {**LATENT, **WINDOW}, {}, "contiguous"),
        ("DEEPSEEK_V2", {**LATENT, "q_lora_rank": None, "v_head_dim": 20}, {}, "zigzag"),
        ("DEEPSEEK_V2", LATENT, {"tensor": 2, "mode": "mtp"}, "zigzag"),
        ("DEEPSEEK_V2", LATENT, {"tensor": 2, "mode": "msp"}, "contiguous"),
        ("DEEPSEEK_V2", LATENT, {"tensor": 2, "mode": "fsp"}, "contiguous"),
        ("DEEPSEEK_V2", LATENT, {"tensor": 2, "mode": "isp"}, "zigzag"),
    ],
    ids=str,
)
def test_context_ranks_save_what_is_estimated(
    family: str, changes: dict[str, Any], axes: dict[str, Any], cut: CutName, ranks: Ranks
) -> None:
    world = 2 * axes.get("tensor", 1)
    layout = ParallelLayout(world_size=world, context=2, **axes)
    for policy in SAVE_POLICIES:
        for _ in range(5):
            found = ranks(world).run(saved_and_estimated, layout, family, policy, changes, cut)
            # The estimate is a product with a quotient of tokens.
            if all(saved == pytest.approx(estimated, rel=1e-12) for saved, estimated in found):
                break
        else:
            pytest.fail(f"{policy}: (bytes saved, estimated) {found}")


def test_the_fullest_rank_gathers_the_whole_sample() -> None:
    """The last one of a contiguous cut; with a window, its own part and a halo."""
    layout, options = ParallelLayout(world_size=4, context=4), ContextOptions("contiguous")
    for changes, expected in ((LATENT, [16, 32, 48, 64]), ({**LATENT, **WINDOW}, [16, 32, 32, 32])):
        dimensions = ModelDimensions.of(model_of("DEEPSEEK_V2", 1, "everything", changes).architecture)
        (window,) = {dimensions.window(0)}
        of_ranks = [gathered_keys(layout, dimensions, options, (64,), rank)[window] for rank in range(4)]
        assert of_ranks == expected
        assert gathered_keys(layout, dimensions, options, (64,)) == {window: max(expected)}
    for other in (ParallelLayout(), ParallelLayout(world_size=4, context=2, tensor=2, mode="isp")):
        assert gathered_keys(other, dimensions, options, (64,)) == {}
