"""A user's config made small keeps what meets parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from internlm.config.loader import load_config
from internlm.config.rules import find_problems
from internlm.config.schema import Config
from internlm.initialize.stages import reduce_dtype
from internlm.verify.case import changed
from internlm.verify.choices import LayoutChoices
from internlm.verify.shrink import shrink

CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.py"))
LAYOUTS = [
    LayoutChoices(),
    LayoutChoices(tensor=2, mode="msp"),
    LayoutChoices(tensor=2, mode="isp", weight=4, overlap=True, pipeline=2, schedule="ZBV", chunks=2),
    LayoutChoices(pipeline=2, chunks=2),
]


def user_config(**model: object) -> Config:
    """A 7B model of which some keys are given."""
    keys = {"vocab_size": 92544, "hidden_size": 4096, "num_layers": 32, "num_attention_heads": 32, **model}
    return Config.model_validate(
        {
            "model": keys,
            "data": {"seq_len": 4096, "micro_bsz": 1, "total_steps": 10},
            "ckpt": {"enable_save_ckpt": False},
        }
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_config_becomes_small_and_stays_valid(path: Path) -> None:
    original = load_config(path, ["parallel.zero1.size=-1"], world_size=64).config
    for layout in LAYOUTS:
        config = shrink(changed(original, layout.keys()))
        assert not list(find_problems(config, 8))
        assert (config.model_type, LayoutChoices.of(config)) == (original.model_type, layout)
        assert config.model.hidden_size <= 256 and config.model.num_layers <= 4 and config.model.vocab_size <= 128
        for flag in ("qkv_bias", "qk_norm", "norm_head", "tie_word_embeddings", "checkpoint", "rope_scaling"):
            assert getattr(config.model, flag) == getattr(original.model, flag)


@pytest.mark.parametrize(("kv_heads", "tensor"), [(32, 4), (8, 4), (4, 4), (2, 4), (1, 4)])
def test_key_value_heads_stand_to_the_ranks_as_before(kv_heads: int, tensor: int) -> None:
    config = user_config(num_kv_attention_heads=kv_heads)
    model = shrink(changed(config, LayoutChoices(tensor=tensor, mode="msp").keys())).model
    small = model.num_kv_attention_heads
    assert small is not None
    assert (small < tensor, small % tensor == 0) == (kv_heads < tensor, kv_heads % tensor == 0)
    assert model.num_attention_heads // small == min(32 // kv_heads, 4)
    assert model.num_attention_heads % tensor == 0


def test_each_rank_has_a_query_head() -> None:
    config = user_config(num_kv_attention_heads=1)
    small = shrink(changed(config, LayoutChoices(tensor=8, mode="msp").keys()))
    assert (small.model.num_attention_heads, small.model.num_kv_attention_heads) == (8, 1)
    assert not list(find_problems(small, 8))


def test_a_budget_of_activations_goes_and_what_is_kept_stays() -> None:
    assert shrink(user_config(checkpoint_budget=12.0)).model.checkpoint_budget is None
    assert (
        shrink(user_config(checkpoint=1.0, checkpoint_save_policy="matmuls")).model.checkpoint_save_policy == "matmuls"
    )


def test_parameter_groups_stay_where_they_match() -> None:
    frozen_layers = [{"match": "layers.0.*", "freeze": True}, {"match": "layers.31.*", "lr_factor": 0.5}]
    small = shrink(changed(user_config(), {"optimizer.groups": frozen_layers}))
    assert [(group.match, group.freeze) for group in small.optimizer.groups] == [("layers.0.*", True)]
    # Of 32 layers the last one is trained; the small model has none of it.
    all_but_one = [{"match": "*", "freeze": True}, {"match": "layers.31.*", "lr_factor": 0.5}]
    assert shrink(changed(user_config(), {"optimizer.groups": all_but_one})).optimizer.groups == []


def test_a_vocabulary_that_does_not_divide_stays_one() -> None:
    for vocab, tensor in ((92544, 4), (92545, 4), (50257, 8)):
        config = changed(user_config(vocab_size=vocab), LayoutChoices(tensor=tensor, mode="msp").keys())
        assert shrink(config).model.vocab_size % tensor == vocab % tensor


def test_windows_are_shorter_than_sequences_and_dtype_is_fp32_unless_kept() -> None:
    config = user_config(use_sliding_window=True, sliding_window=1024, max_window_layers=20)
    small = shrink(config)
    assert small.model.sliding_window is not None and small.model.sliding_window < small.data.seq_len
    assert small.model.max_window_layers == 1 < small.model.num_layers
    assert small.model.dtype == "torch.float32"
    assert shrink(config, dtype=None).model.dtype == "torch.bfloat16"


def test_float8_is_off_unless_asked_for() -> None:
    """Its rounding turns another order of additions into larger differences than those of the defects looked for."""
    config = changed(user_config(), {"float8.enable_float8_linear": True})
    assert not list(find_problems(config, 1))
    small = shrink(config)
    assert not small.float8.enable_float8_linear and not list(find_problems(small, 1))


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [
        *((layout, 8) for layout in LAYOUTS),
        (LayoutChoices(tensor=8, mode="isp", weight=2), 8),
        (LayoutChoices(tensor=4), 8),
    ],
)
@pytest.mark.parametrize("kv_heads", [32, 8, 1])
def test_float8_is_compared_in_float64_and_fits_every_layout(
    kv_heads: int, layout: LayoutChoices, world_size: int
) -> None:
    keys = {
        "float8.enable_float8_linear": True,
        "use_fp32_norm": True,
        "reduce_comm_dtype": "torch.bfloat16",
        "adam.moments_dtype": "torch.bfloat16",
        "hybrid_zero_optimizer.grad_accumulation_dtype": "torch.bfloat16",
        "hybrid_zero_optimizer.offload_optimizer": True,
        **layout.keys(),
    }
    config = shrink(changed(user_config(num_kv_attention_heads=kv_heads), keys), float8=True)
    assert not list(find_problems(config, world_size))
    assert config.model.torch_dtype == reduce_dtype(config) == torch.float64 and not config.use_fp32_norm
    assert len(config.float8.layers(config.model.num_layers)) == config.model.num_layers
    is_shared = layout.mode != "isp" and config.model.num_kv_heads < layout.tensor
    assert not is_shared and config.model.num_attention_heads % config.model.num_kv_heads == 0
