"""Rules of float8: what each says, and that it is silent on a good neighbour."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.configs import small_config

from internlm.config.rules import find_problems
from internlm.core.context.parallel_context import ParallelContext
from internlm.initialize import stages
from internlm.initialize.build import build_layout, check_buildable
from internlm.initialize.stages import build_chunks, build_options
from internlm.utils.errors import ConfigError

ON = {"float8.enable_float8_linear": True, "model.hidden_size": 64, "model.num_attention_heads": 4}
EXPERTS = {"model_type": "QWEN3MOE", "model.num_experts": 4, "model.top_k": 2, "model.moe_type": "Dropless"}
TENSOR, MODE = "parallel.tensor.size", "parallel.tensor.mode"

# changes of the small config with float8, world size, the only mistake (None: there is none).
CASES: list[tuple[dict[str, Any], int, str | None]] = [
    ({}, 1, None),
    *[
        (
            {f"float8.scaling_type_{what}": "delayed"},
            1,
            f"float8.scaling_type_{what} = 'delayed': scales from earlier steps are not supported, as torchao has "
            "removed them; use 'dynamic', which computes each scale from its tensor",
        )
        for what in ("input", "weight", "grad_output")
    ],
    (
        {"model.dtype": "torch.float16"},
        1,
        "float8.enable_float8_linear = True needs model.dtype = 'torch.bfloat16', which is 'torch.float16'",
    ),
    ({"model.dtype": "torch.float64"}, 1, None),
    (
        {"model.num_layers": 2},
        1,
        "float8.enable_float8_linear = True changes nothing: the first and the last layer stay in 'torch.bfloat16', "
        "and model.num_layers = 2; set float8.first_and_last_layer = True, or turn float8 off",
    ),
    ({"model.num_layers": 2, "float8.first_and_last_layer": True}, 1, None),
    # Widths.
    (
        {"model.hidden_size": 72, "model.head_dim": 16},
        1,
        "model.hidden_size = 72 must be a multiple of 16 for float8; set 80",
    ),
    (
        {"model.intermediate_size": 176, TENSOR: 2},
        2,
        "model.intermediate_size = 176 makes the MLP 176 wide on 2 tensor rank(s), which must be a multiple of 32 for "
        "float8; set model.intermediate_size = 192",
    ),
    ({"model.intermediate_size": 176, TENSOR: 2, MODE: "isp"}, 2, None),
    ({"model.intermediate_size": 192, TENSOR: 2}, 2, None),
    (
        {"model.head_dim": 8, "model.num_kv_attention_heads": 2, TENSOR: 2},
        2,
        "model.num_kv_attention_heads = 2 heads of 8 channels, split over 2 tensor rank(s), are 8 channels a rank, "
        "which must be a multiple of 16 for float8; set model.head_dim = 16, or another parallel.tensor.size",
    ),
    ({"model.head_dim": 8, "model.num_kv_attention_heads": 2, TENSOR: 2, MODE: "isp"}, 2, None),
    ({"model.num_kv_attention_heads": 1, TENSOR: 4}, 4, None),
    # Experts: those of a rank are whole, unless tensor ranks split them.
    ({**EXPERTS, "model.moe_intermediate_size": 48, TENSOR: 2}, 2, None),
    (
        {**EXPERTS, "model.moe_intermediate_size": 48, TENSOR: 2, "parallel.expert.no_tp": False},
        2,
        "model.moe_intermediate_size = 48 makes an expert 48 wide on 2 tensor rank(s), which must be a multiple of 32 "
        "for float8; set model.moe_intermediate_size = 64",
    ),
    (
        {**EXPERTS, "model.moe_intermediate_size": 40},
        1,
        "model.moe_intermediate_size = 40 makes an expert 40 wide on 1 tensor rank(s), which must be a multiple of 16 "
        "for float8; set model.moe_intermediate_size = 48",
    ),
    (
        {**EXPERTS, "model.intermediate_size": 40},
        1,
        "model.intermediate_size = 40 makes an expert 40 wide on 1 tensor rank(s), which must be a multiple of 16 "
        "for float8; set model.intermediate_size = 48",
    ),
    # Tokens.
    (
        {"data.seq_len": 12},
        1,
        "data.seq_len = 12 times data.micro_bsz = 2 are 24 tokens on 1 sequence rank(s), which must be a multiple of "
        "16 for float8; set data.seq_len = 16",
    ),
    ({"data.seq_len": 24}, 1, None),
    ({TENSOR: 4, MODE: "msp"}, 4, None),
    (
        {TENSOR: 4, MODE: "isp"},
        4,
        "data.seq_len = 16 times data.micro_bsz = 2 are 32 tokens on 4 sequence rank(s), which must be a multiple of "
        "64 for float8; set data.seq_len = 32",
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "mistake"), CASES)
def test_rule(changes: dict[str, Any], world_size: int, mistake: str | None) -> None:
    found = [found.text for found in find_problems(small_config({**ON, **changes}), world_size)]
    assert found == ([] if mistake is None else [mistake])
    off = {**ON, **changes, "float8.enable_float8_linear": False}
    assert not list(find_problems(small_config(off), world_size)), "without float8 there is nothing to refuse"
    if mistake is None:
        check_buildable(small_config({**ON, **changes}), world_size)


@pytest.mark.parametrize("family", ["INTERNLM2", "LLAMA2"])
@pytest.mark.parametrize(("tensor", "kv_heads", "mode"), [(2, 2, "mtp"), (4, 2, "msp"), (4, 4, "fsp"), (4, 1, "isp")])
def test_what_the_rules_pass_can_be_built(family: str, tensor: int, kv_heads: int, mode: str) -> None:
    changes = {
        "model_type": family,
        "model.num_kv_attention_heads": kv_heads,
        "data.seq_len": 32,
        TENSOR: tensor,
        MODE: mode,
    }
    config = small_config({**ON, **changes})
    check_buildable(config, tensor)
    context = ParallelContext(build_layout(config, tensor), tensor - 1, torch.device("cpu"))
    build_chunks(config, context)


def test_the_first_and_the_last_layer_are_those_of_the_model() -> None:
    """Not those of a stage of its pipeline."""
    config = small_config({**ON, "parallel.pipeline.size": 2})
    assert build_options(config).float8_layers == range(1, 3)
    assert build_options(small_config({**ON, "float8.first_and_last_layer": True})).float8_layers == range(4)
    assert not build_options(small_config({})).float8_layers
    for stage, float8, other in ((0, "1", "0"), (1, "2", "3")):
        context = ParallelContext(build_layout(config, 2), stage, torch.device("cpu"))
        (chunk,) = build_chunks(config, context)
        kinds = {n: type(layer.feed_forward.w2).__name__ for n, layer in chunk.layers.items()}  # type: ignore[union-attr,operator]
        assert kinds == {float8: "Float8Linear", other: "Linear"}


def test_a_device_without_float8_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "why_not_on_hardware", lambda device: "NVIDIA A100 has compute capability 8.0")
    context = ParallelContext(build_layout(small_config(ON), 1), 0, torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"enable_float8_linear = True: NVIDIA A100 has .* 8.0; set it to False"):
        build_chunks(small_config(ON), context)


def test_float64_is_refused_on_a_gpu() -> None:
    config = small_config({"model.dtype": "torch.float64"})
    context = ParallelContext(build_layout(config, 1), 0, torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"model.dtype = 'torch.float64' is for comparisons on a CPU"):
        build_chunks(config, context)
