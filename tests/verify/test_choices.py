"""The one-line text forms of layouts, models, documents and steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from internlm.config.schema import Config
from internlm.utils.errors import ConfigError
from internlm.verify.case import changed
from internlm.verify.choices import BatchChoices, LayoutChoices, ModelChoices, StepChoices, from_text, to_text

CHOICES = [
    LayoutChoices(),
    LayoutChoices(
        tensor=2, mode="isp", weight=4, overlap=True, pipeline=2, schedule="ZBV", chunks=2, zero=2, fsdp=True
    ),
    ModelChoices(family="QWEN3", tied=False, checkpoint=0.5, save_policy="matmuls", dtype="bfloat16"),
    BatchChoices(packed=False, masked="ends"),
    StepChoices(clip=0.0, overlap_grad=True, groups="frozen_layer"),
]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_the_text_gives_the_choices_back(choices: object) -> None:
    assert from_text(type(choices), to_text(choices)) == choices


def test_only_what_differs_from_the_default_is_written() -> None:
    assert to_text(LayoutChoices()) == ""
    assert to_text(LayoutChoices(tensor=2, fsdp=True)) == "tensor=2,fsdp=true"


def test_a_flag_stands_alone_and_letters_may_be_of_any_case() -> None:
    assert from_text(LayoutChoices, " overlap, schedule=zbv ,pipeline=2,mode=ISP") == LayoutChoices(
        overlap=True, schedule="ZBV", pipeline=2, mode="isp"
    )


def test_all_mistakes_are_told_with_what_was_meant() -> None:
    with pytest.raises(ConfigError) as caught:
        from_text(LayoutChoices, "tenso=2,zero=x,schedule=1F1,fsdp=maybe,mode=isp")
    assert caught.value.mistakes == [
        "'tenso=2': unknown name 'tenso', known: tensor, mode, context, context_placement, context_cut, "
        "context_exchange, context_window, weight, overlap, pipeline, schedule, chunks, zero, fsdp, expert, "
        "expert_zero, expert_tensor, expert_weight, expert_overlap. Did you mean 'tensor'?",
        "'zero=x': expected a whole number",
        "'schedule=1F1': expected one of 1F1B, ZBH1, ZBV, DUALPIPEV. Did you mean '1F1B'?",
        "'fsdp=maybe': expected true or false",
    ]


def test_a_config_and_its_layout_say_the_same() -> None:
    config = Config.model_validate(
        {
            "data": {"seq_len": 8, "micro_bsz": 1, "total_steps": 1},
            "model": {"vocab_size": 8, "hidden_size": 8, "num_layers": 4, "num_attention_heads": 1},
        }
    )
    layout = LayoutChoices(tensor=2, mode="msp", pipeline=2, chunks=2, zero=1)
    experts = LayoutChoices(expert=2, expert_zero=1)
    mixture = changed(config, {"model_type": "QWEN3MOE", "model.num_experts": 4, "model.moe_type": "Dropless"})
    assert LayoutChoices.of(changed(mixture, experts.keys())) == experts
    assert LayoutChoices.of(config) == LayoutChoices()
    assert LayoutChoices.of(changed(config, layout.keys())) == layout
    assert LayoutChoices.of(changed(changed(config, layout.keys()), LayoutChoices().keys())) == LayoutChoices()
    two = LayoutChoices(tensor=2, mode="isp", context=8, context_window=4, context_placement="context_first")
    for placement in ("context_first", "interleaved"):
        placed = replace(two, context_placement=placement)
        assert LayoutChoices.of(changed(config, placed.keys())) == placed
        assert LayoutChoices.of(changed(changed(config, placed.keys()), LayoutChoices().keys())) == LayoutChoices()
    keys = {**two.keys(), "parallel.sequence_2D.device_placement_strategy": {"head_first": True}}
    assert LayoutChoices.of(changed(config, keys)) == replace(two, context_placement="head_first")
