"""Classes whose layers carry a state from token to token must not get packed documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.hf_classes import TINY
from helpers.hf_runs import class_folder, hf_model_config

from internlm.config.loader import load_config
from internlm.config.schema import PipelineConfig
from internlm.core.context.parallel_context import ParallelContext
from internlm.initialize.hf_class_checks import check_class, class_differences, small_copy
from internlm.utils.errors import ConfigError

transformers = pytest.importorskip("transformers")

HYBRID = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "decoder_sparse_step": 100,
    "mlp_only_layers": [0, 1, 2, 3],
}


def load(tmp_path: Path, family: str, packed: bool, **changes: Any) -> Any:
    folder = class_folder(family, tmp_path / "class", **changes)
    (tmp_path / "config.py").write_text(
        f'model_type = "hf"\nhf = dict(folder="{folder}")\nmodel = dict(dtype="torch.float32")\n'
        f"data = dict(seq_len=8, micro_bsz=1, total_steps=1, use_packed_dataset={packed})\n"
        "ckpt = dict(enable_save_ckpt=False)\n"
    )
    return load_config(tmp_path / "config.py").config


def check(config: Any) -> None:
    check_class(config, ParallelContext.create())


def test_a_state_from_token_to_token_is_refused_with_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TINY, "qwen3_next", HYBRID)
    with pytest.raises(ConfigError, match="in Qwen3NextForCausalLM, packed documents change each other's logits"):
        check(load(tmp_path, "qwen3_next", True))
    check(load(tmp_path, "qwen3_next", False))


@pytest.mark.parametrize("family", sorted(TINY.keys() - {"mamba", "bloom"}))
def test_tested_classes_compute_what_they_do_themselves(family: str, tmp_path: Path) -> None:
    separate, packed, staged = class_differences(small_copy(hf_model_config(family, tmp_path)))
    assert max(separate, packed) < 2e-5
    # These add positions to the input of their layers, or multiply it.
    assert (staged < 2e-5) == (family not in {"gpt2", "granite"})


def test_stages_that_repeat_what_the_first_one_does_are_refused(tmp_path: Path) -> None:
    config = load(tmp_path, "gpt2", True)
    check(config)
    piped = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"pipeline": PipelineConfig(size=2)})}
    )
    with pytest.raises(ConfigError, match="stages of GPT2LMHeadModel compute other logits than the whole model"):
        check(piped)


def test_an_unknown_change_of_the_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no config says: here, a class that halves its logits."""
    original = transformers.LlamaForCausalLM.forward

    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = out.logits / 2
        return out

    config = load(tmp_path, "llama", False)
    check(config)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", halved)
    with pytest.raises(ConfigError, match="the logits of a small LlamaForCausalLM differ here from its own by"):
        check(config)


def test_a_copy_that_does_not_run_is_said_and_packing_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm.initialize.hf_class_checks.small_copy", lambda model, layers: 1 / 0)
    (line,) = check_class(load(tmp_path, "llama", False), ParallelContext.create())
    assert "LlamaForCausalLM was not compared with itself" in line and "ZeroDivisionError" in line
    with pytest.raises(ConfigError, match="Whether its packed documents see each other is unknown"):
        check(load(tmp_path, "llama", True))


JAMBA = {"attn_layer_offset": 6, "attn_layer_period": 8, "num_experts": 2, "use_mamba_kernels": False}


def test_a_first_attention_behind_other_layers_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TINY, "jamba", JAMBA)
    with pytest.raises(ConfigError, match="in JambaForCausalLM, packed documents change each other's logits"):
        check(load(tmp_path, "jamba", True, num_hidden_layers=8))


def test_rotary_scaling_by_the_longest_document_is_refused(tmp_path: Path) -> None:
    scaled = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    with pytest.raises(ConfigError, match="rotates all documents of a micro-batch by the length of the longest one"):
        load(tmp_path, "llama", True, **scaled)
    load(tmp_path, "llama", False, **scaled)


def test_a_loss_of_routers_is_refused(tmp_path: Path) -> None:
    """The class adds it where its config says so; without, it trains as here."""
    message = (
        r"MixtralForCausalLM adds a loss .*output_router_logits = True, router_aux_loss_coef = 0.02.*cfg_extra_kwargs"
    )
    with pytest.raises(ConfigError, match=message):
        check(load(tmp_path, "mixtral", True, output_router_logits=True, router_aux_loss_coef=0.02))
    for keys in ({"output_router_logits": True, "router_aux_loss_coef": 0.0}, {"router_aux_loss_coef": 0.02}):
        check(load(tmp_path, "mixtral", True, **keys))


def test_noise_of_routers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"draws random numbers while it trains \(router_jitter_noise = 0.1\)"):
        check(load(tmp_path, "mixtral", True, router_jitter_noise=0.1))
