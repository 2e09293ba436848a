"""Every kind of rope scaling against transformers, within the pretrained length and beyond."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from helpers.model import tiny_model
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from internlm.model.huggingface.to_config import hf_config, transformers_config_json
from internlm.model.huggingface.weight_names import to_hf
from internlm.model.modules.rotary import RopeSettings, dynamic_frequencies, inverse_frequencies
from internlm.model.ops.attention.causal_attention import VarlenMetadata

ORIGINAL = 16
LENGTHS = (7, 16, 21, 48)
"""Documents shorter than, as long as and longer than the pretrained length."""

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"type": "linear", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "dynamic-1": {"type": "dynamic", "factor": 1.0},
    "llama3": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "llama3-own-ramp": {"type": "llama3", "factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0},
    "yarn": {"type": "yarn", "factor": 4.0},
    "yarn-own-ramp": {"type": "yarn", "factor": 8.0, "beta_fast": 2.0, "beta_slow": 0.1, "truncate": False},
    "yarn-attention": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5},
}


@pytest.fixture(params=SCALINGS)
def model(request: pytest.FixtureRequest) -> Any:
    """A Llama whose weights are large enough that attention depends on positions."""
    scaling = {**SCALINGS[request.param], "original_max_position_embeddings": ORIGINAL}
    model = tiny_model("LLAMA3", max_position_embeddings=ORIGINAL, rope_scaling=scaling, rope_base=500.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return model


def peer_of(model: Any) -> Any:
    """transformers' model; a new one for each length, because dynamic scaling remembers the longest."""
    peer = transformers.LlamaForCausalLM(hf_config(model.architecture))
    peer.load_state_dict(to_hf(model.state_dict(), model.architecture))
    return peer.eval()


def test_frequencies_and_attention_factor(model: Any) -> None:
    rope: RopeSettings = model.architecture.rope
    config = hf_config(model.architecture)
    init = ROPE_INIT_FUNCTIONS[rope.rope_type]
    for length in LENGTHS:
        theirs, attention_factor = init(config, torch.device("cpu"), seq_len=length)
        if rope.rope_type == "dynamic":
            ours = dynamic_frequencies(rope, torch.tensor(length))
        else:
            ours = inverse_frequencies(rope)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-12)


def test_logits_of_rows_and_of_packed_documents(model: Any) -> None:
    ids = torch.randint(0, model.architecture.vocab_size, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        packed = model.logits(model(ids, positions, VarlenMetadata.of(LENGTHS))).split(LENGTHS, 1)
        for document, ours in zip(ids.split(LENGTHS, 1), packed, strict=True):
            theirs = peer_of(model)(document).logits
            alone = model.logits(model(document, torch.arange(document.shape[1])[None]))
            for logits in (ours, alone):
                assert_close(logits, theirs)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


def test_unscaled_positions_give_other_logits(model: Any) -> None:
    """The comparison above sees whether positions are scaled."""
    plain = tiny_model("LLAMA3", max_position_embeddings=ORIGINAL, rope_base=500.0)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(0, model.architecture.vocab_size, (1, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, unscaled = (each.logits(each(ids, torch.arange(48)[None])) for each in (model, plain))
    assert float((ours - unscaled).abs().max()) > 1e-3 * float(ours.abs().max())


def test_static_ntk_is_a_larger_base() -> None:
    """NTK-aware scaling by s is base * s^(d / (d - 2)): dynamic NTK with factor 1 at s times the pretrained length."""
    dim, base, scale = 32, 1e4, 8
    dynamic = RopeSettings(dim, base, "dynamic", factor=1.0, max_positions=256)
    static = RopeSettings(dim, base * scale ** (dim / (dim - 2)))
    torch.testing.assert_close(
        inverse_frequencies(static), dynamic_frequencies(dynamic, torch.tensor(scale * 256)), rtol=1e-6, atol=0
    )
    # The longest wavelength grows by the scale, the shortest stays.
    ratio = inverse_frequencies(RopeSettings(dim, base)) / inverse_frequencies(static)
    assert float(ratio[0]) == 1 and math.isclose(float(ratio[-1]), scale, rel_tol=1e-5)


@pytest.mark.parametrize("keys", [{"max_position_embeddings": 16}, {"max_position_embeddings": 64}])
@pytest.mark.parametrize("kind", ["yarn", "llama3", "linear", "dynamic"])
def test_exports_give_every_reader_the_same_factor(kind: str, keys: dict[str, Any]) -> None:
    """transformers 4 takes YaRN's factor from the lengths; servers multiply the pretrained one."""
    scaling = {"type": kind, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    model = tiny_model("LLAMA3", **keys, rope_scaling=scaling)
    values = transformers_config_json(model.architecture)
    length, rope = values["max_position_embeddings"], values["rope_scaling"]
    if kind in ("yarn", "llama3"):
        assert length / rope["original_max_position_embeddings"] == rope["factor"] == 4
    else:
        assert length == ORIGINAL and rope["factor"] == 4
    assert values["rope_parameters"].items() >= rope.items()
