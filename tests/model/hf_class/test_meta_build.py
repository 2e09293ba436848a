"""Classes of transformers without storage: the buffers, ties and initial values that the class itself gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.hf_classes import TINY, tiny_config
from torch import Tensor, nn

from internlm.core.parallel.materialize import draw
from internlm.core.parallel.shard_spec import ShardSpec
from internlm.model.hf_class.initial_values import RecordedValues, WholeValues
from internlm.model.hf_class.meta_build import build_on_meta
from internlm.model.initialization import initializer_of
from internlm.utils.errors import ConfigError

transformers = pytest.importorskip("transformers")


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    config = tiny_config(family, **changes)
    kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    return build_on_meta(lambda: kind._from_config(config, dtype=dtype), dtype)


def fresh(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)


def values(parameter: nn.Parameter, name: str = "weight", seed: int = 1) -> Tensor:
    spec = ShardSpec.whole(name, tuple(parameter.shape))
    return draw(spec, initializer_of(parameter), seed, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("family", TINY)
def test_buffers_ties_and_distributions_are_those_of_the_class(family: str) -> None:
    model, reference = build(family), fresh(family)
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = dict(reference.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    shared = dict(reference.named_parameters()) | {
        name: buffer for name, buffer in reference.named_buffers() if name in reference.state_dict()
    }
    assert {name for name, _ in model.named_parameters()} == shared.keys()
    others = [dict(fresh(family, seed).state_dict()) for seed in range(1, 5)]
    for name, parameter in model.named_parameters():
        drawn, theirs = values(parameter, name), shared[name].detach()
        samples = torch.stack([theirs, *(state[name] for state in others)])
        if (samples == samples[0]).all():
            assert torch.equal(drawn, theirs), name
        else:
            # Both standard deviations are estimates: 6 of their own.
            tolerance = 6 * samples.std() / (2 * drawn.numel()) ** 0.5
            assert abs(drawn.std(correction=0) - samples.std()) < tolerance + 0.05 * samples.std(), name
            assert abs(drawn.mean() - samples.mean()) < 6 * samples.std() / drawn.numel() ** 0.5 + 1e-6, name


def test_a_padding_row_is_zero_and_every_other_row_is_drawn() -> None:
    embedding = build("gemma").get_parameter("model.embed_tokens.weight")
    assert isinstance(initializer_of(embedding), WholeValues)
    drawn = values(embedding)
    assert not drawn[0].any() and drawn[1:].all(1).all()


def test_values_that_a_module_gives_to_its_children_are_kept() -> None:
    """Mamba's mixer sets the bias of a linear layer that it contains."""
    model = build("mamba")
    assert values(model.get_parameter("backbone.layers.0.mixer.dt_proj.bias")).mean() < -1.0


def test_an_element_does_not_depend_on_the_part_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = build("llama").get_parameter("model.layers.0.mlp.up_proj.weight")
    initializer = initializer_of(parameter)
    assert isinstance(initializer, RecordedValues)
    part = torch.empty(3, 5)
    initializer.fill(part, torch.Generator().manual_seed(3))
    expected = torch.empty(3, 5).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(3))
    assert torch.equal(part, expected)


def test_weights_that_a_class_keeps_in_fp32_stay_there() -> None:
    class Kept(transformers.LlamaForCausalLM):
        _keep_in_fp32_modules_strict = ("input_layernorm",)

    model = build_on_meta(lambda: Kept._from_config(tiny_config("llama"), dtype=torch.bfloat16), torch.bfloat16)
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {f"model.layers.{layer}.input_layernorm.weight" for layer in range(4)}
    others = [parameter for name, parameter in model.named_parameters() if name not in kept]
    assert all(parameter.dtype == torch.bfloat16 for parameter in others)


def test_the_default_dtype_is_restored() -> None:
    build("llama", torch.float64)
    assert torch.get_default_dtype() == torch.float32


def test_a_parameter_that_nothing_sets_is_named() -> None:
    class Forgetful(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.forgotten = nn.Parameter(torch.full((3,), float("nan")))

    with pytest.raises(ConfigError, match="Forgetful leaves 'forgotten' undefined"):
        build_on_meta(lambda: Forgetful(tiny_config("llama")), torch.float32)


def test_a_saved_buffer_becomes_a_parameter_that_is_not_trained() -> None:
    class Scaled(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("scale", torch.tensor([2.0, 3.0]))

    scale = build_on_meta(lambda: Scaled(tiny_config("llama")), torch.float32).get_parameter("scale")
    assert not scale.requires_grad
    assert torch.equal(values(scale), torch.tensor([2.0, 3.0]))


def test_a_saved_buffer_of_integers_is_refused() -> None:
    class Counting(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("count", torch.zeros(3, dtype=torch.int64))

    with pytest.raises(ConfigError, match="count"):
        build_on_meta(lambda: Counting(tiny_config("llama")), torch.float32)
