"""FLOPs of classes of transformers: those of our own families where both compute the same, else those torch counts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configs import small_config
from helpers.hf_classes import tiny_class
from helpers.hf_configs import LLAMA, MIXTURES, architecture
from helpers.hf_runs import hf_case, hf_model_config
from torch.utils.flop_counter import FlopCounterMode

from internlm.config.hf_class import filled_model_section
from internlm.config.schema import Config, ModelConfig
from internlm.core.context.parallel_context import ParallelContext
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.flops import flops_per_token
from internlm.initialize.build_hooks import build_flops
from internlm.initialize.model_flops import token_flops
from internlm.initialize.stages import build_chunks, build_layer_split
from internlm.model.huggingface.from_config import from_hf_config
from internlm.monitor.throughput import Throughput
from internlm.utils.errors import ConfigError
from internlm.verify.run import start_case

transformers = pytest.importorskip("transformers")

SEQ = 24
GROUPED = {**LLAMA, "num_key_value_heads": 2, "head_dim": 16}
SAME: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "head_dim": 8},
    "qwen3": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 7},
    "gemma": {**GROUPED, "tie_word_embeddings": True},
    **{name: {**LLAMA, **keys} for name, keys in MIXTURES.items() if name != "kimi_k2"},
}
"""Configs that describe both a class of transformers and a family of this package."""


def run_of(model: ModelConfig, seq_len: int = SEQ) -> Config:
    config = small_config({})
    data = config.data.model_copy(update={"seq_len": seq_len})
    return config.model_copy(update={"model_type": "hf", "model": model, "data": data})


@pytest.mark.parametrize("kind", SAME)
def test_a_class_has_the_flops_of_our_family(kind: str, tmp_path: Path) -> None:
    values = {**SAME[kind], "model_type": kind, "architectures": None}
    config = transformers.CONFIG_MAPPING[kind].from_dict(values)
    config.save_pretrained(tmp_path)
    section = filled_model_section({"folder": str(tmp_path)}, {"dtype": "torch.float32"})
    found = token_flops(run_of(ModelConfig.model_validate(section)), torch.nn.Identity())
    ours = from_hf_config(values, kind)
    dimensions = ModelDimensions.of(architecture(ours.model_type, ModelConfig(dtype="torch.float32", **ours.keys)))
    assert found.full == flops_per_token(dimensions, SEQ, "full")
    assert found.causal == flops_per_token(dimensions, SEQ, "causal")
    assert found.head == 6 * 48 * 97


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "smollm3", "starcoder2", "glm4", "apertus"])
def test_a_class_has_the_flops_that_torch_counts(family: str, tmp_path: Path) -> None:
    ids = torch.ones(1, SEQ, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tiny_class(family)(input_ids=ids, use_cache=False)
    flops = token_flops(run_of(hf_model_config(family, tmp_path)), torch.nn.Identity())
    assert flops.full * SEQ == 3 * counter.get_total_flops()


def test_rates_of_a_stage_are_those_of_the_whole_model(tmp_path: Path) -> None:
    case = hf_case("ranks=1", "qwen3", tmp_path)
    context = start_case(case)
    flops = build_flops(case.config, context.device, build_chunks(case.config, context)[0])
    assert flops is not None
    throughput = Throughput(flops=flops)
    throughput.add(1000, seconds=0.5)
    dimensions = ModelDimensions(4, 32, 4, 2, 8, 64, 96)
    expected = 2000 * flops_per_token(dimensions, case.config.data.seq_len, "causal")
    assert throughput.rates()["tflops"] == pytest.approx(expected / 1e12)


def test_stages_of_equal_cost_count_the_head(tmp_path: Path) -> None:
    """4 layers of 9,216 weights, and a head of 32,000, which is the last stage's."""
    model = hf_model_config("llama", tmp_path, vocab_size=1000)
    config = run_of(model)
    pipeline = config.parallel.pipeline.model_copy(update={"size": 2, "layer_split": "cost"})
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"pipeline": pipeline})})
    assert [len(layers) for layers in build_layer_split(config)] == [3, 1]


def test_flops_that_do_not_grow_with_the_tokens_are_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {f"linear_{part}": 8 for part in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = hf_model_config("qwen3_next", tmp_path, **experts, **sizes)
    with pytest.raises(ConfigError, match="the FLOPs of a Qwen3NextForCausalLM are not known: besides attention"):
        token_flops(run_of(model), torch.nn.Identity())
    with caplog.at_level(logging.INFO, logger="internlm"):
        assert build_flops(run_of(model), ParallelContext.create().device, torch.nn.Identity()) is None
    assert "tflops and mfu are left out of the metrics: the FLOPs of a Qwen3NextForCausalLM" in caplog.text
