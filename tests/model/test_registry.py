"""Model types by name, a user's own among them, and mistakes in the model section."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.model import materialize, tiny_config

from internlm.model import registry
from internlm.model.ops.implementations import OpSettings, describe
from internlm.model.registry import build_model, known_models, register_model
from internlm.utils.errors import ConfigError

DOC = Path(__file__).parents[2] / "doc" / "models.md"


@pytest.fixture(autouse=True)
def restore_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    known_models()
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'INTERNLM_2'.*Did you mean 'INTERNLM2'"):
        build_model("INTERNLM_2", tiny_config())


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="already registered"):
        register_model("LLAMA2")(lambda config, norm_dtype: torch.nn.Identity())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"num_kv_attention_heads": 4},
            r"num_attention_heads \(6\) must be a multiple of model.num_kv_attention_heads",
        ),
        ({"hidden_size": 50}, r"hidden_size \(50\) must be a multiple"),
        ({"head_dim": 7}, r"head dimension \(7\) must be even"),
        ({"add_unit_offset": True}, "add_unit_offset: this model_type has False"),
        ({"use_swiglu": False}, "model.use_swiglu = False: the gate of this model_type is SiLU; leave the key out"),
    ],
)
def test_mistakes_in_the_config(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model("LLAMA2", tiny_config(**keys))


def test_the_gate_of_gpt_oss_is_named() -> None:
    keys = {"num_experts": 4, "top_k": 2, "moe_type": "Dropless"}
    with pytest.raises(ConfigError, match=r"model\.use_swiglu = True: the gate of this model_type is a clamped SiLU"):
        build_model("GPT_OSS", tiny_config(use_swiglu=True, **keys))


def test_every_op_says_what_it_runs_on() -> None:
    for device in ("cpu", "cuda"):
        choices = describe(device)
        compiled = describe(device, OpSettings(compiled=True))
        assert choices.keys() == compiled.keys()
        assert "compiled" in compiled["rotary"].implementation and "compiled" not in choices["rotary"].implementation
        assert {"attention", "rms_norm", "rotary", "linear_cross_entropy"} <= choices.keys()
        assert all(choice.implementation and choice.reason for choice in choices.values())
    assert "flash_attn_varlen" not in describe("cuda", OpSettings(use_flash_attn=False))["attention"].implementation


def test_the_documented_model_of_ones_own() -> None:
    """The examples of doc/models.md run and give models."""
    text = DOC.read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(compile(example, str(DOC), "exec"), {})
    ids, positions = torch.arange(12)[None], torch.arange(12)[None]
    for name in ("MY_LLAMA", "BIGRAM", "HALF_RELU"):
        with torch.device("meta"):
            model = build_model(name, tiny_config())
        materialize(model)
        hidden = model(ids, positions)
        assert model.logits(hidden).shape == (1, 12, 97) == (1, 12, model.head_weight().shape[0])
        model.logits(hidden).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
