"""What is not there yet is refused by name, key by key; nothing is silently ignored."""

import functools
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from internlm.config.schema import Config
from internlm.config.schema.base import Status, default_of, key_info, walk_schema
from internlm.config.unsupported import _JUDGED_ELSEWHERE, LATER_FAMILIES, find_ineffective, find_unsupported

BASE = {
    "data": dict(seq_len=16, micro_bsz=2, total_steps=10),
    "model": dict(vocab_size=64, hidden_size=32, num_layers=4, num_attention_heads=4),
    "ckpt": dict(save_ckpt_folder="x", checkpoint_every=5),
}


FIM = {"rate": 0.5, "prefix": 1, "middle": 2, "suffix": 3}
# What optional sections need at least.
REQUIRED: dict[str, dict[str, Any]] = {"load_ckpt_info": {"path": "x"}, "fim": FIM, "conversations": {}}


def build(path, value):
    tree = {name: dict(section) for name, section in BASE.items()}
    place = tree
    *outer, name = path.split(".")
    for part in outer:
        place = place.setdefault(part, dict(REQUIRED.get(part, {})))
    place[name] = value
    return Config.model_validate(tree)


def at(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


def other_value(path, field) -> Any:
    """Some value that the key takes and that is not its default."""
    kinds = (field.annotation, *get_args(field.annotation))
    accepted = key_info(field).accepts
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind) if word not in accepted]
    for value in (
        *words,
        7,
        True,
        False,
        0.5,
        0.25,
        "other",
        "linear",
        ["a"],
        [1],
        {"a": "b"},
        [{"a": "b"}],
        {"a": 1},
        [{"match": "*"}],
        [{"path": "x", "weight": 1}],
        {"learn": "last"},
        FIM,
        {"mm_vision_tower": "x"},
        {"mm_hidden_size": 7},
        {"learn": "last"},
    ):
        try:
            config = build(path, value)
        except ValidationError:
            continue
        if at(config, path) != default_of(field):
            return value
    raise AssertionError(f"no value found for {path}")


def keys(*statuses):
    return [
        pytest.param(path, other_value(path, field), id=path)
        for path, field in walk_schema(Config)
        if key_info(field).status in statuses
        and not key_info(field).forced
        and not f"{path}.".startswith("model.rope_scaling.")
        and not path.startswith("hf.")  # one line for all of them
        and path not in ("ckpt.load_ckpt_info", "model.num_chunks")  # the second is 1 without a pipeline
    ]


@pytest.mark.parametrize("path, value", keys(Status.LATER))
def test_a_later_key_is_refused_by_name(path, value):
    found = [m for m in find_unsupported(build(path, value)) if m.keys == (path,)]
    assert len(found) == 1
    assert found[0].text.startswith(f"{path} = {at(build(path, value), path)!r}: ")
    assert "is not yet supported; set it to " in found[0].text


@pytest.mark.parametrize("path, value", keys(Status.NO_EFFECT))
def test_a_key_without_effect_gives_a_notice(path, value):
    config = build(path, value)
    assert list(find_unsupported(config)) == []
    (notice,) = find_ineffective(config, lambda _: None)
    assert notice.startswith("no effect: ") and path in notice and "(" in notice


@pytest.mark.parametrize("path, value", keys(Status.SUPPORTED, Status.DEPENDENT, Status.LIBRARY_ONLY))
def test_other_keys_are_neither_refused_nor_without_effect(path, value):
    config = build(path, value)
    assert [m.text for m in find_unsupported(config)] == []
    assert list(find_ineffective(config, lambda _: None)) == []


@pytest.mark.parametrize("path, value", keys(Status.DEPENDENT))
def test_a_key_whose_switch_is_off_gives_a_notice(path, value):
    """Wherever the switch is: none is on by default."""
    config = build(path, value)
    (switch,) = {key_info(field).detail for other, field in walk_schema(Config) if other == path}
    found = [notice for notice in find_ineffective(config, functools.partial(at, config)) if f"{path} = " in notice]
    if path in _JUDGED_ELSEWHERE:
        assert found == []
    else:
        (notice,) = found
        assert notice.startswith("no effect: ") and f"({switch} = " in notice


def test_a_key_whose_switch_is_on_gives_none():
    tree = {
        **BASE,
        "float8": {"enable_float8_linear": True, "compile": True},
        "model": {**BASE["model"], "compile": True, "cuda_graphs": True},
    }
    tree["grad_profiling"] = {"zero_grad_profiling": True, "interval_steps": 3}
    config = Config.model_validate(tree)
    assert list(find_ineffective(config, functools.partial(at, config))) == []


def test_sections_that_are_absent_by_default():
    assert list(find_unsupported(build("ckpt.load_ckpt_info", dict(path="x")))) == []


def test_rope_scaling():
    assert list(find_unsupported(build("model.rope_scaling", dict(type="yarn", factor=4)))) == []


def test_the_default_config_is_supported_and_silent():
    config = Config.model_validate(BASE)
    assert list(find_unsupported(config)) == []
    assert list(find_ineffective(config, lambda _: None)) == []


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_expert_sizes_that_ask_for_nothing(size):
    assert list(find_unsupported(build("parallel.expert.size", size))) == []


def test_what_means_nothing_while_saving_is_off():
    config = build("ckpt", dict(BASE["ckpt"], enable_save_ckpt=False, oss_snapshot_freq=5, async_save=True))
    assert list(find_unsupported(config)) == []
    assert list(find_ineffective(config, lambda _: None)) == [
        "no effect: ckpt.oss_snapshot_freq, ckpt.async_save (saving is off)"
    ]


MIXTURE = {"num_experts": 4, "top_k": 2}


@pytest.mark.parametrize(
    ("model", "loss", "notices"),
    [
        (
            {"top_k": 2, "num_shared_experts": 1},
            {"moe_loss_coeff": 0.1},
            ["model.top_k = 2, model.num_shared_experts = 1, loss.moe_loss_coeff = 0.1 (model.num_experts = 1)"],
        ),
        (
            {**MIXTURE, "moe_layer_kwargs": {"topk_group": 2, "group_score": "top2_sum"}},
            {},
            [
                "model.moe_layer_kwargs.topk_group = 2, model.moe_layer_kwargs.group_score = 'top2_sum' "
                "(model.moe_layer_kwargs.n_group = 1)"
            ],
        ),
        (
            MIXTURE,
            {"moe_bias_update_rate": 0.001},
            ["loss.moe_bias_update_rate = 0.001 (model.moe_layer_kwargs.selection_bias = False)"],
        ),
        (
            {**MIXTURE, "moe_layer_kwargs": {"selection_bias": True}},
            {"moe_bias_centered": True},
            ["loss.moe_bias_centered = True (loss.moe_bias_update_rate = 0.0)"],
        ),
        (
            {},
            {"multi_token_loss_coeff": 0.1},
            ["loss.multi_token_loss_coeff = 0.1 (model.num_nextn_predict_layers = 0)"],
        ),
        (MIXTURE, {"moe_loss_coeff": 0.1}, []),
        ({"num_nextn_predict_layers": 1}, {"multi_token_loss_coeff": 0.1}, []),
    ],
)
def test_keys_of_a_mixture_that_another_key_makes_useless(model, loss, notices):
    config = Config.model_validate({**BASE, "model": {**BASE["model"], **model}, "loss": loss})
    given = functools.partial(at, config)
    assert list(find_ineffective(config, given)) == [f"no effect: {notice}" for notice in notices]


@pytest.mark.parametrize("family", LATER_FAMILIES)
def test_families(family):
    (mistake,) = find_unsupported(build("model_type", family))
    assert family in mistake.text and LATER_FAMILIES[family] in mistake.text
