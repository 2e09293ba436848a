"""The configs we ship: all load without an avoidable notice, in the size of the published models."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch
import transformers
from helpers.forked import run_forked

from internlm.cli import main
from internlm.config.loader import load_config
from internlm.convert.from_hf import architecture_of, imported_config
from internlm.convert.hf_folder import meta_weights
from internlm.initialize.stages import build_meta_model
from internlm.model.huggingface.from_config import from_hf_config

CONFIGS = Path(__file__).parents[2] / "configs"

# Parameters in billions, as the cards of the published models give them.
BILLIONS = {
    "7B_sft.py": 7.32,
    "7B_isp_sft.py": 7.74,
    "7B_internlm2.py": 7.74,
    "1.8B_internlm2.py": 1.89,
    "20B_internlm2.py": 19.86,
    "20B_sft.py": 20.09,
    "7B_llama2.py": 6.74,
    "30B_llama2.py": 32.53,
    "70B_llama2.py": 68.98,
    "7B_llava_stage1.py": 7.06,
    "7B_llava_stage2.py": 7.06,
    "8B_llama3.py": 8.03,
    "7B_mistral.py": 7.24,
    "7B_qwen2.py": 7.62,
    "8B_qwen3.py": 8.19,
    "7B_baichuan2.py": 7.51,
    "7B_gemma.py": 8.54,
    "8B_internlm3.py": 8.80,
    "8x7B_mixtral.py": 46.70,
    "30B_A3B_qwen3.py": 30.53,
    "2.2B_MoE16_internlm.py": 2.24,
    "16B_deepseek_v2_lite.py": 15.71,
    "7B_A1B_olmoe.py": 6.92,
    "20B_gpt_oss.py": 20.91,
    "106B_A12B_glm4.5_air.py": 106.85,
}
# model_type -> transformers' class, and what is unlike its defaults in the config.json of the published model.
PUBLISHED = {
    "OLMOE": ("OlmoeConfig", {"intermediate_size": 1024}),
    "GPT_OSS": ("GptOssConfig", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "GLM4_MOE": (
        "Glm4MoeConfig",
        {
            "head_dim": 128,
            "attention_bias": True,
            "num_mtp_layers": 0,  # 1, which these weights do not count
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        },
    ),
}
NOTICES = {
    "20B_gpt_oss.py": ["attention sinks have no fused kernel on GPUs"],
    **{f"7B_llava_stage{n}.py": ["'local:llm_ckpts/xxxx' is a placeholder"] for n in (1, 2)},
}
# What InternEvo's configs of these names split, tensor x pipeline x weight; all others split nothing but the data.
SPLITS = {
    "7B_isp_sft.py": (2, 1, 4),
    "20B_internlm2.py": (1, 4, 4),
    "20B_sft.py": (4, 1, 1),
    "30B_llama2.py": (4, 4, 1),
    "70B_llama2.py": (8, 4, 1),
    "8x7B_mixtral.py": (4, 1, 1),
    "30B_A3B_qwen3.py": (1, 1, 8),
    "16B_deepseek_v2_lite.py": (1, 1, 4),
    "7B_A1B_olmoe.py": (1, 1, 4),
    "20B_gpt_oss.py": (1, 1, 4),
    "106B_A12B_glm4.5_air.py": (1, 1, 8),
}


def num_ranks(name: str) -> int:
    """The number of ranks that the docstring of a config names."""
    text = ast.get_docstring(ast.parse((CONFIGS / name).read_text()))
    if "any number of ranks" in text:
        return 1
    return int(re.search(r"For (\d+) ranks, or a multiple of them\.", text)[1])


def parameters(config) -> int:
    """Weights of a decoder with gated MLP, counted from the shape alone."""
    model = config.model
    if model.kv_lora_rank is not None:
        return parameters_of_deepseek(model)
    if config.model_type in PUBLISHED:
        return sum(weight.numel() for weight in meta_weights(architecture_of(config)).values())
    if config.model_type == "LLAVA":
        return sum(weight.numel() for weight in build_meta_model(config).parameters())
    heads = model.num_attention_heads
    size = model.head_dim or model.hidden_size // heads
    kv_heads = model.num_kv_attention_heads or heads
    attention = model.hidden_size * size * (2 * heads + 2 * kv_heads)
    is_first = config.model_type in ("INTERNLM", "INTERNLM_MoE")
    bias = size * (heads + 2 * kv_heads) if model.qkv_bias or is_first else 0
    bias += model.hidden_size if is_first else 0
    experts = model.num_experts + model.num_shared_experts if model.num_experts > 1 else 1
    layer = attention + bias + 3 * model.hidden_size * model.ffn_size * experts + 2 * model.hidden_size
    # A router, and a gate of two rows with a bias.
    layer += model.num_experts * model.hidden_size if model.num_experts > 1 else 0
    layer += 2 * model.hidden_size + 2 if model.num_experts > 1 and model.num_shared_experts else 0
    layer += 2 * size if model.qk_norm or config.model_type == "QWEN3MOE" else 0
    embeddings = (1 if config.model_type == "GEMMA" else 2) * model.vocab_size * model.hidden_size
    return model.num_layers * layer + embeddings + model.hidden_size


def parameters_of_deepseek(model) -> int:
    """Weights of DeepSeek-V2-Lite: queries without a latent vector, shared experts without a gate."""
    assert model.q_lora_rank is None
    heads, rank, rotary = model.num_attention_heads, model.kv_lora_rank, model.qk_rope_head_dim
    attention = model.hidden_size * (heads * (model.qk_nope_head_dim + rotary) + rank + rotary)
    attention += rank + rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    attention += heads * model.v_head_dim * model.hidden_size
    experts = model.num_experts + model.num_shared_experts
    mixture = model.hidden_size * (3 * model.moe_intermediate_size * experts + model.num_experts)
    dense = model.first_k_dense_replace
    layers = model.num_layers * (attention + 2 * model.hidden_size) + (model.num_layers - dense) * mixture
    layers += dense * 3 * model.hidden_size * model.intermediate_size
    return layers + (2 * model.vocab_size + 1) * model.hidden_size


@pytest.mark.parametrize("name", ["7B_A1B_olmoe.py", "20B_gpt_oss.py", "106B_A12B_glm4.5_air.py"])
def test_mixtures_are_those_of_the_published_config_json(name):
    """Compared as architectures, and in size with transformers' class."""
    ours = load_config(CONFIGS / name, world_size=num_ranks(name)).config
    class_name, keys = PUBLISHED[ours.model_type]
    published = getattr(transformers, class_name)(**keys)
    values = {key: value for key, value in published.to_dict().items() if value is not None}
    architecture = architecture_of(ours)
    imported = architecture_of(imported_config(from_hf_config(values, name), torch.bfloat16))
    assert dataclasses.replace(architecture, save_policies=imported.save_policies) == imported
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(published)
    learned = {n: w for n, w in meta_weights(architecture).items() if not n.endswith("selection_bias")}
    assert sum(weight.numel() for weight in learned.values()) == sum(weight.numel() for weight in theirs.parameters())


def test_every_config_is_tested():
    assert {path.name for path in CONFIGS.glob("*.py")} == {"demo.py", *BILLIONS}


@pytest.mark.parametrize("name", ["demo.py", *BILLIONS])
def test_every_config_loads_without_an_avoidable_notice(name):
    for world_size in (num_ranks(name), 3 * num_ranks(name)):
        loaded = load_config(CONFIGS / name, world_size=world_size)
        expected = NOTICES.get(name, [])
        assert len(loaded.notices) == len(expected)
        assert all(text in notice for text, notice in zip(expected, loaded.notices, strict=True))
        assert loaded.config.ckpt.auto_resume and loaded.config.JOB_NAME in loaded.config.ckpt.save_ckpt_folder
        assert loaded.config.ckpt.checkpoint_every > 0


@pytest.mark.parametrize("name", BILLIONS)
def test_every_config_is_of_its_published_size_and_splits_it_as_before(name):
    config = load_config(CONFIGS / name, world_size=num_ranks(name)).config
    assert parameters(config) / 1e9 == pytest.approx(BILLIONS[name], abs=0.006)
    parallel = config.parallel
    sizes = (parallel.tensor.size, parallel.pipeline.size, parallel.weight.size)
    assert sizes == SPLITS.get(name, (1, 1, 1))


@pytest.mark.parametrize("name", ["demo.py", *BILLIONS])
def test_every_config_runs_dry(name):
    text = run_forked(CONFIGS.parent, dry_run, name)
    assert f"on {num_ranks(name)} rank(s)" in text and "the config is valid" in text


def dry_run(name):
    options = ["--dry-run", "--world-size", str(num_ranks(name))]
    if name == "demo.py":  # its data is made by tools/demo.sh
        options += ["--set", "data.train_folder=None", "--set", "data.valid_folder=None"]
    assert main(["train", "--config", f"configs/{name}", *options]) == 0


def test_demo_runs_on_a_laptop():
    config = load_config(CONFIGS / "demo.py").config
    assert parameters(config) < 20e6
    assert config.data.tokenizer_path == "data/demo/tokenizer.json"
    assert (config.data.train_folder, config.data.valid_folder) == ("data/demo/train", "data/demo/valid")


@pytest.mark.parametrize("name", ["internlm_7B", "internlm_20B", "internlm2_1B", "internlm2_7B", "internlm2_20B"])
def test_model_bases_are_found_by_the_names_users_know(name, tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(
        "from internlm.utils.utils import read_base\nwith read_base():\n"
        "    from configs._base_.default_runtime import *\n"
        f"    from configs._base_.models.{name} import *\n"
        "data = dict(seq_len=16, micro_bsz=1, total_steps=5)\nckpt = dict(enable_save_ckpt=False)\n"
    )
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(path, ["parallel.tensor.size=1"], world_size=16).config
    assert config.model.hidden_size >= 2048 and config.adam.lr == 1e-4
