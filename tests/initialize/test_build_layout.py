"""From a config to a layout, and mistakes found without a process group."""

import itertools

import pytest
import torch
from helpers.configs import small_config

from internlm.config.rules import find_problems
from internlm.config.schema import Config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.initialize.build import build_layout, check_buildable
from internlm.initialize.stages import build_meta_model
from internlm.utils.errors import ConfigError


@pytest.mark.parametrize(
    "tensor, kv_heads, mode, copies",
    [(4, 2, "mtp", 2), (4, 1, "msp", 4), (2, 2, "fsp", 1), (2, 4, "mtp", 1), (4, 2, "isp", 1), (1, 1, "mtp", 1)],
)
def test_key_value_heads_are_copied_where_there_are_fewer_than_tensor_ranks(
    tensor: int, kv_heads: int, mode: str, copies: int
) -> None:
    changes = {
        "model.num_kv_attention_heads": kv_heads,
        "parallel.tensor.size": tensor,
        "parallel.tensor.mode": mode,
    }
    layout = build_layout(small_config(changes), 8)
    assert (layout.tensor, layout.kv_replicas, layout.mode) == (tensor, copies, mode)


def test_a_family_without_grouped_heads_has_no_copies() -> None:
    assert build_layout(small_config({"parallel.tensor.size": 4}), 4).kv_replicas == 1


def test_a_config_built_in_python_is_checked_whole() -> None:
    check_buildable(small_config({"parallel.tensor.size": 2, "parallel.pipeline.size": 2}), 8)
    with pytest.raises(ConfigError) as error:
        check_buildable(
            small_config(
                {"parallel.tensor.size": 3, "parallel.pipeline.layer_split": [5], "parallel.pipeline.size": 2}
            ),
            8,
        )
    keys = [mistake.split(" = ")[0] for mistake in error.value.mistakes]
    assert keys == [
        "parallel.pipeline.layer_split",
        "parallel.tensor.size",
        "model.num_attention_heads",
        "model.mlp_ratio",
    ]


@pytest.mark.parametrize("mode", ["mtp", "isp"])
def test_the_rules_refuse_what_cannot_be_split_and_nothing_else(mode: str) -> None:
    """Against what the modes do: fused and separate projections, tied and untied heads. msp and fsp split as mtp."""
    refused = 0
    for heads, kv_heads, width, tensor, family in itertools.product(
        (4, 6), (1, 2, 3, 6), (24, 28), (2, 3, 4, 6), ("INTERNLM2", "LLAMA2", "GEMMA")
    ):
        if heads % kv_heads:
            continue
        config = small_config(
            {
                "model_type": family,
                "model.vocab_size": 61,
                "model.head_dim": 8,
                "model.num_attention_heads": heads,
                "model.num_kv_attention_heads": kv_heads,
                "model.num_layers": 1,
                "model.intermediate_size": width,
                "data.seq_len": 12,
                "parallel.tensor.size": tensor,
                "parallel.tensor.mode": mode,
                "parallel.weight.size": tensor if mode == "isp" else 1,
            }
        )
        mistakes = [mistake.text for mistake in find_problems(config, tensor)]
        assert can_be_split(config, tensor) == (not mistakes), (heads, kv_heads, width, tensor, family, mistakes)
        refused += bool(mistakes)
    assert refused > 10


def can_be_split(config: Config, world_size: int) -> bool:
    """Whether the first and the last rank find their part of every weight and of the heads."""
    try:
        layout = build_layout(config, world_size)
        for rank in (0, world_size - 1):
            parallelize(build_meta_model(config), ParallelContext(layout, rank, torch.device("cpu")))
    except ConfigError:
        return False
    return True
