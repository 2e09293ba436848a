"""From a config to a layout, and mistakes found without a process group."""

import pytest
from helpers.configs import small_config

from internlm.initialize.build import build_layout, check_buildable
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
        "model.embed_split_hidden",
    ]
