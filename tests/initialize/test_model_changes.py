"""A run that goes on from a checkpoint, or starts with its weights, under another config."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import write_config
from helpers.configs import small_config
from helpers.hf_folders import save_native
from helpers.hf_runs import class_folder, hf_model_config
from helpers.llava import CLIP

from internlm.config.compare import changes_between, keys_that_change_outputs
from internlm.config.loader import load_config
from internlm.config.schema import Config
from internlm.config.schema.base import Status, key_info, walk_schema
from internlm.convert.checkpoint_types import trained_as
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.trainer import Trainer
from internlm.initialize.build import build_layout, build_trainer
from internlm.initialize.model_changes import check_same_function, function_of
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.storage import storage_path

# -- what the schema says of each key ----------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    "model_type": "LLAMA2",
    "model.num_kv_attention_heads": 2,
    "model.use_sliding_window": True,
    "model.sliding_window": 8,
    "model.rope_scaling": {"type": "yarn", "factor": 2.0},
    "model.checkpoint": 0.5,
    "model.hidden_size": 64,
}
"""A model of which most keys are in use."""

EXPERTS: dict[str, Any] = {
    "model_type": "MIXTRALMOE",
    "model.hidden_size": 64,
    "model.num_experts": 8,
    "model.top_k": 2,
    "model.moe_type": "Dropless",
    "model.moe_layer_kwargs": {"n_group": 4, "topk_group": 2},
}
"""A mixture of experts, for the keys that a dense model does not read."""

LATENT: dict[str, Any] = {
    "model_type": "DEEPSEEK_V3",
    "model.hidden_size": 64,
    "model.q_lora_rank": 16,
    "model.kv_lora_rank": 16,
    "model.qk_nope_head_dim": 8,
    "model.qk_rope_head_dim": 8,
    "model.v_head_dim": 8,
    "model.rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}
"""Multi-head latent attention."""

_OF_EXPERTS = ("moe_", "num_experts", "top_k", "num_shared_experts", "first_k_dense_replace", "mlp_only_layers")
_OF_LATENT = (
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_scaling.mscale",
)

GSHARD: dict[str, Any] = EXPERTS | {"model.moe_type": "GShard", "model.top_k": 1, "model.moe_layer_kwargs": {}}

PICTURES: dict[str, Any] = {
    "model_type": "LLAVA",
    "model.image_token_id": 3,
    "model.vit_cfg.config": CLIP,
    "model.vit_cfg.mm_vision_select_layer": -2,
    "model.vision_proj_cfg.mm_projector_type": "linear",
}

OWN_BASE: dict[str, dict[str, Any]] = {
    # Keys that need company.
    "model.moe_layer_kwargs.use_fused_gating": GSHARD,
    "model.moe_layer_kwargs.use_rts": GSHARD | {"model.moe_layer_kwargs": {"use_fused_gating": False}},
    "model.moe_layer_kwargs.drop_tokens": GSHARD,
    "model.moe_layer_kwargs.min_capacity": GSHARD,
    "model.moe_layer_kwargs.eval_capacity_factor": GSHARD,
    "model.moe_layer_kwargs.drop_policy": EXPERTS | {"model.moe_layer_kwargs": {"capacity_factor": 2.0}},
}

OTHER: dict[str, dict[str, Any]] = {
    "model.vit_cfg": {"model.vit_cfg.mm_vision_select_layer": -1},
    "model.vit_cfg.config": {"model.vit_cfg.config": {**CLIP, "hidden_act": "gelu"}},
    "model.vit_cfg.mm_vision_select_feature": {"model.vit_cfg.mm_vision_select_feature": "cls_patch"},
    "model.vit_cfg.mm_vision_select_layer": {"model.vit_cfg.mm_vision_select_layer": -1},
    "model.vision_proj_cfg": {"model.vision_proj_cfg.mm_projector_type": "mlp2x_gelu"},
    "model.vision_proj_cfg.mm_projector_type": {"model.vision_proj_cfg.mm_projector_type": "mlp2x_gelu"},
    "model.vision_proj_cfg.mm_hidden_size": {"model.vision_proj_cfg.mm_hidden_size": 20},
    "model.vision_proj_cfg.hidden_size": {"model.vision_proj_cfg.hidden_size": 32},
    # Where another value is not found by itself, or needs a company.
    "model.rope_scaling.type": {"model.rope_scaling.type": "linear"},
    "model.hidden_size": {"model.hidden_size": 128},
    "model.num_attention_heads": {"model.num_attention_heads": 8},
    "model.num_kv_attention_heads": {"model.num_kv_attention_heads": 4},
    "model.head_dim": {"model.head_dim": 32},
    "model.intermediate_size": {"model.intermediate_size": 96},
    "model.multiple_of": {"model.multiple_of": 96},
    "model.no_bias": {"model.no_bias": False},
    "model.norm_type": {"model.norm_type": "layernorm"},
    "model.rope_scaling": {"model.rope_scaling": None},
    "model.rope_scaling.factor": {"model.rope_scaling.factor": 4.0},
    "model.rope_scaling.original_max_position_embeddings": {"model.rope_scaling.original_max_position_embeddings": 512},
    "model.rope_scaling.attention_factor": {"model.rope_scaling.attention_factor": 2.0},
    "model.dtype": {"model.dtype": "torch.float32"},
    "model.attention_backend": {"model.attention_backend": "sdpa"},
    "model.fused_kernels": {"model.fused_kernels": "none"},
    "model.cpu_gemm": {"model.cpu_gemm": "fp32"},
    "model.checkpoint": {"model.checkpoint": 1.0},
    "model.checkpoint_save_policy": {"model.checkpoint_save_policy": "matmuls"},
    "model.checkpoint_budget": {"model.checkpoint_budget": 1.0},
    "model.cuda_graphs": {"model.cuda_graphs": True},
    "model.init_type": {"model.init_type": "uniform"},
    "model.mlp_ratio": {"model.mlp_ratio": 8.0},
    "model.adapt_hf": {"model.adapt_hf": False, "model.qk_interleaved": True},
    "model_type": {"model_type": "QWEN2"},
    "model.moe_layer_kwargs.group_score": {
        "model.moe_layer_kwargs": {"n_group": 4, "topk_group": 2, "group_score": "top2_sum"}
    },
    "model.moe_layer_kwargs.scoring_func": {
        "model.moe_layer_kwargs": {"n_group": 4, "topk_group": 2, "scoring_func": "sigmoid"}
    },
    "model.moe_layer_kwargs.eval_capacity_factor": {"model.moe_layer_kwargs.eval_capacity_factor": 2.0},
    "model.moe_layer_kwargs.min_capacity": {"model.moe_layer_kwargs.min_capacity": 8},
    "model.moe_layer_kwargs.drop_tokens": {"model.moe_layer_kwargs.drop_tokens": False},
    "model.moe_layer_kwargs.drop_policy": {
        "model.moe_layer_kwargs": {"capacity_factor": 2.0, "drop_policy": "position"}
    },
    "model.moe_layer_kwargs.noisy_gate_policy": {"model.moe_layer_kwargs.noisy_gate_policy": "Jitter"},
    "model.moe_intermediate_size": {"model.moe_intermediate_size": 48},
    "model.moe_type": {"model.moe_type": "MegaBlock"},
    "model.first_k_dense_replace": {"model.first_k_dense_replace": 1},
    "model.mlp_only_layers": {"model.mlp_only_layers": [1]},
    "model.partial_rotary_factor": {"model.partial_rotary_factor": 0.5},
    "model.sliding_window_pattern": {"model.sliding_window_pattern": 2},
    "model.rope_scaling.mscale": {"model.rope_scaling.mscale": 0.5},
    "model.rope_scaling.mscale_all_dim": {"model.rope_scaling.mscale_all_dim": 0.5},
    "model.moe_layer_kwargs.n_group": {"model.moe_layer_kwargs": {"n_group": 2, "topk_group": 2}},
    "model.moe_layer_kwargs.topk_group": {"model.moe_layer_kwargs": {"n_group": 4, "topk_group": 3}},
}

NOT_FOR_THIS_FAMILY = {
    # What is in the folder counts, which tests/initialize/test_vision_tower.py compares.
    "model.vit_cfg.mm_vision_tower",
    # The whole config of a class of transformers, see tests/convert/test_hf_class_weights.py.
    "model.hf_class",
    # Llamas refuse any value but their own; read with the other kinds of scaling below.
    *("model.add_unit_offset", "model.use_swiglu"),
    *("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor", "model.use_dynamic_ntk_rope"),
}


def another_value(path: str, config: Config) -> dict[str, Any]:
    if path in OTHER:
        return OTHER[path]
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    if isinstance(value, bool) or value is None:
        return {path: not value}
    assert isinstance(value, int | float), path
    return {path: value * 2 if value else 0.5 if isinstance(value, float) else 1}


def _base_of(path: str) -> dict[str, Any]:
    name = path.removeprefix("model.")
    if name.startswith(("image_token_id", "vit_cfg", "vision_proj_cfg")):
        return PICTURES
    return EXPERTS if name.startswith(_OF_EXPERTS) else LATENT if name.startswith(_OF_LATENT) else BASE


def keys_in_use() -> Iterator[tuple[str, bool]]:
    for path, field in walk_schema(Config):
        info = key_info(field)
        assert info is not None
        depends_on_later = info.status is Status.DEPENDENT and info.detail.startswith("model.inject_info")
        if not (path.startswith("model.") or path == "model_type") or depends_on_later or path in NOT_FOR_THIS_FAMILY:
            continue
        if info.status not in (Status.LATER, Status.NO_EFFECT):
            yield path, bool(info.changes_outputs)


@pytest.mark.parametrize("path, changes_outputs", list(keys_in_use()))
def test_what_a_key_says_is_what_it_does(path: str, changes_outputs: bool) -> None:
    keys = OWN_BASE.get(path) or _base_of(path)
    base = small_config(copy.deepcopy(keys))
    other = small_config(copy.deepcopy(keys) | another_value(path, base))
    before, after = (function_of(config) for config in (base, other))
    assert (before != after) == changes_outputs


@pytest.mark.parametrize(
    "rope, change",
    [
        ({"type": "llama3"}, {"low_freq_factor": 2.0}),
        ({"type": "llama3"}, {"high_freq_factor": 8.0}),
        ({"type": "dynamic"}, {"original_max_position_embeddings": 512}),
    ],
)
def test_kinds_of_scaling_read_their_own_keys(rope: dict[str, Any], change: dict[str, Any]) -> None:
    base = {**BASE, "model.rope_scaling": {**rope, "factor": 2.0}}
    config = small_config({**base, "model.rope_scaling": {**rope, "factor": 2.0, **change}})
    with pytest.raises(CheckpointError, match=f"model.rope_scaling.{next(iter(change))}: "):
        check_same_function(small_config(base), config, "it")
    # Of which the others read nothing.
    base["model.rope_scaling"] = {"type": "linear", "factor": 2.0}
    check_same_function(
        small_config(base), small_config({**base, "model.rope_scaling": {**base["model.rope_scaling"], **change}}), "it"
    )


def test_the_same_function_in_other_words_is_no_change() -> None:
    old = {"model_type": "LLAMA2", "model.mlp_ratio": 2.0, "model.multiple_of": 16}
    new = {
        "model_type": "LLAMA3",
        "model.norm_type": "rmsnorm",
        "model.intermediate_size": 64,
        "model.num_kv_attention_heads": 4,
        "model.head_dim": 8,
        "model.no_bias": True,
        "model.max_position_embeddings": 4096,
        "model.sliding_window": 5,
    }
    check_same_function(small_config(old), small_config(new), "it")
    # Of a function that did change, only the keys that change it are named.
    with pytest.raises(CheckpointError) as error:
        check_same_function(small_config(old), small_config({**new, "model.rope_base": 5e5}), "it")
    assert "outputs:\n  model.rope_base: 10000.0 -> 500000.0\nrestore the keys" in str(error.value)


# -- resuming and loading ----------------------------------------------------------------------------------------------


def new(folder: Path, **changes: Any) -> Trainer:
    """A trainer of the tiny config with its checkpoint loaded; `changes` are keys with `__` for a dot."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in {"data__total_steps": 2, **changes}.items()]
    config = load_config(write_config(folder), overrides).config
    return build_trainer(config, ParallelContext.create(build_layout(config, 1)), folder / "run")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("saved")
    new(folder).fit()
    return folder


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    with caplog.at_level(logging.WARNING, "internlm"):
        yield caplog


CHANGES = [
    ({"model__rope_base": 5e5}, "model.rope_base: 10000.0 -> 500000.0"),
    ({"model__layer_norm_epsilon": 1e-6}, "model.layer_norm_epsilon: 1e-05 -> 1e-06"),
    (
        {"model__rope_scaling": {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 2048}},
        "model.rope_scaling: None -> {'type': 'linear', 'factor': 4.0, 'original_max_position_embeddings': 2048}",
    ),
    ({"model__use_sliding_window": True, "model__sliding_window": 8}, "model.use_sliding_window: False -> True"),
    ({"model__qk_interleaved": True}, "model.qk_interleaved: False -> True"),
    ({"model__num_attention_heads": 2}, "model.num_attention_heads: 4 -> 2"),
    ({"model_type": "GEMMA"}, "model_type: 'INTERNLM2' -> 'GEMMA'"),
]


@pytest.mark.parametrize("changes, line", CHANGES)
@pytest.mark.parametrize("loads", [False, True], ids=["resumed", "loaded"])
def test_another_function_is_refused(
    saved: Path, tmp_path: Path, changes: dict[str, Any], line: str, loads: bool
) -> None:
    folder = saved
    if loads:
        changes = {**changes, "ckpt__load_ckpt_info": {"path": f"{saved}/checkpoints"}}
        folder = tmp_path
    with pytest.raises(CheckpointError) as error:
        new(folder, **changes)
    assert f"the checkpoint '{saved}/checkpoints/2' was trained as another function" in str(error.value)
    assert f"\n  {line}\n" in str(error.value)
    assert "ckpt.allow_model_changes = ('model" in str(error.value)


@pytest.mark.parametrize("allowed", ["True", "('model.rope_base', 'model.rope_scaling')"])
def test_a_change_that_is_meant_is_allowed_and_told(saved: Path, told: pytest.LogCaptureFixture, allowed: str) -> None:
    scaling = {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 2048}
    changes = {"model__rope_base": 5e5, "model__rope_scaling": scaling}
    trainer = new(saved, ckpt__allow_model_changes=allowed, **changes)
    assert trainer.state.step == 2
    assert "which ckpt.allow_model_changes allows:\n  model.rope_base: 10000.0 -> 500000.0\n" in told.text
    if allowed != "True":
        with pytest.raises(CheckpointError, match=r"outputs:\n  model\.layer_norm_epsilon: "):
            new(saved, ckpt__allow_model_changes=allowed, model__layer_norm_epsilon=1e-6, **changes)


def test_a_key_that_the_config_no_longer_has_is_compared_by_its_default(tmp_path: Path) -> None:
    new(tmp_path, model__rope_base=5e5).fit()
    with pytest.raises(CheckpointError, match=r"outputs:\n  model\.rope_base: 500000\.0 -> 10000\.0\n"):
        new(tmp_path)


def test_a_name_that_is_no_such_key_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"names 'model.rope_bas', .* Did you mean 'model.rope_base'\?"):
        new(tmp_path, ckpt__allow_model_changes="('model.rope_bas',)")
    assert "model.dtype" not in keys_that_change_outputs()


def test_other_changes_are_told_in_one_notice_with_the_learning_rate(
    saved: Path, told: pytest.LogCaptureFixture
) -> None:
    new(saved)
    assert "differs" not in told.text
    new(saved, adam__lr=6e-3, adam__weight_decay=0.5, data__total_steps=8, data__seed=5, model__compile=False, seed=9)
    (notice,) = [message for message in told.messages if "the config differs" in message]
    assert notice.splitlines() == [
        f"the config differs from that of the checkpoint '{saved}/checkpoints/2':",
        "  seed: 1024 -> 9",
        "  data.total_steps: 2 -> 8",
        "  data.seed: 1024 -> 5",
        "  adam.lr: 0.003 -> 0.006",
        "  adam.weight_decay: 0.01 -> 0.5",
        "  learning rate of the next step: 0.003 -> 0.006",
    ]


def test_weights_alone_bring_no_settings_of_their_training(
    saved: Path, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    info = {"path": f"{saved}/checkpoints", "content": ("model",)}
    new(tmp_path, ckpt__load_ckpt_info=info, adam__lr=6e-3, model__dtype="torch.bfloat16")
    (notice,) = [message for message in told.messages if "the config differs" in message]
    assert notice.splitlines()[1:] == ["  model.dtype: 'torch.float32' -> 'torch.bfloat16'"]


def test_a_config_that_cannot_be_read_is_told(saved: Path, tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    new(tmp_path).fit()
    checkpoint = tmp_path / "checkpoints" / "2"
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**values, "of_another_version": 1}))
    mark = json.loads((checkpoint / "2.step").read_text())
    del mark["files"]["config.json"]
    (checkpoint / "2.step").write_text(json.dumps(mark))
    assert new(tmp_path).state.step == 2
    assert f"{checkpoint}/config.json: its config cannot be compared with that of this run" in told.text


# -- weights of other formats ------------------------------------------------------------------------------------------


def judged(path: Path, ckpt_type: str, config: Config) -> None:
    trained = trained_as(ckpt_type, storage_path(path), config)
    assert trained is not None
    check_same_function(trained, config, f"'{path}'", translated=True)


def test_a_hugging_face_folder_of_another_function(tmp_path: Path) -> None:
    model = save_native("llama", tmp_path).config
    same = {
        "model_type": "LLAMA2",
        "model.vocab_size": model.vocab_size,
        "model.hidden_size": model.hidden_size,
        "model.intermediate_size": model.intermediate_size,
        "model.num_layers": model.num_hidden_layers,
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_kv_attention_heads": model.num_key_value_heads,
        "model.layer_norm_epsilon": model.rms_norm_eps,
    }
    judged(tmp_path, "hf", small_config(same))
    # Weights are brought into the order that the run wants.
    judged(tmp_path, "hf", small_config({**same, "model.qk_interleaved": True, "model.enable_qkv_fusion": True}))
    for change, line in (
        ({"model.rope_base": 5e5}, "model.rope_base: 10000.0 -> 500000.0"),
        ({"model.layer_norm_epsilon": 1e-4}, "model.layer_norm_epsilon: "),
        ({"model.use_sliding_window": True, "model.sliding_window": 8}, "model.use_sliding_window: False -> True"),
    ):
        with pytest.raises(CheckpointError, match=line):
            judged(tmp_path, "hf", small_config({**same, **change}))
        judged(tmp_path, "hf", small_config({**same, **change, "ckpt.allow_model_changes": True}))


def test_a_folder_of_another_class_is_told_by_what_differs(tmp_path: Path) -> None:
    """Not by two whole configs; classes first."""
    class_folder("qwen3", tmp_path / "other", rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    config = small_config({}).model_copy(update={"model_type": "hf", "model": hf_model_config("llama", tmp_path)})
    with pytest.raises(CheckpointError) as caught:
        judged(tmp_path / "other", "hf", config)
    (line,) = [line for line in str(caught.value).splitlines() if "Qwen3ForCausalLM" in line]
    assert line.startswith(
        "  model.hf_class: model_class 'transformers.models.qwen3.modeling_qwen3.Qwen3ForCausalLM' -> "
    )
    assert "config.rope_parameters.rope_theta 7.0 -> 10000.0" in line
    assert "config.pretraining_tp absent -> 1" in line
    assert "vocab_size" not in line and len(line) < 900


@pytest.mark.parametrize(
    "params, change, line",
    [
        ({}, {}, None),
        ({"rope_theta": 5e5}, {"model.rope_base": 5e5}, None),
        ({"norm_eps": 1e-6}, {}, "model.layer_norm_epsilon: 1e-06 -> 1e-05"),
        ({}, {"model.rope_base": 5e5}, "model.rope_base: 10000.0 -> 500000.0"),
        ({"use_scaled_rope": True}, {}, "model.rope_scaling: {'type': 'llama3', 'factor': 8.0, .*} -> None"),
        ({"use_scaled_rope": True}, {"model.rope_scaling": {"type": "llama3", "factor": 32.0}}, None),
        (
            {},
            {"model.rope_scaling": {"type": "llama3", "factor": 8.0}},
            "model.rope_scaling: None -> {'type': 'llama3', 'factor': 8.0}",
        ),
    ],
)
def test_metas_folder_of_another_function(
    tmp_path: Path, params: dict[str, Any], change: dict[str, Any], line: str | None
) -> None:
    (tmp_path / "params.json").write_text(json.dumps({"norm_eps": 1e-5, **params}))
    config = small_config({"model_type": "LLAMA3", **change})
    if line is None:
        judged(tmp_path, "llama", config)
        return
    with pytest.raises(CheckpointError, match=line):
        judged(tmp_path, "llama", config)


def test_a_registered_format_tells_nothing_of_the_model(tmp_path: Path) -> None:
    assert trained_as("of_mine", storage_path(tmp_path), small_config({})) is None


def test_the_order_of_a_blend_is_no_change() -> None:
    web = {"path": "web", "weight": 0.5}
    group = {"weight": 1, "blend": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2}]}
    config, other = (small_config({"data.blend": blend}) for blend in ([web, group], [group, web]))
    inner = small_config({"data.blend": [{**group, "blend": group["blend"][::-1]}, web]})
    assert changes_between(config, other) == changes_between(config, inner) == []
    heavier = small_config({"data.blend": [group, {**web, "weight": 0.6}]})
    (change,) = changes_between(config, heavier)
    assert "'weight': 0.6" in str(change) and "BlendEntryConfig" not in str(change)
