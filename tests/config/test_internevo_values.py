"""Values that InternEvo takes: what each means here, and the notice or the refusal."""

import pytest
import torch
from helpers.internevo_configs import is_difference

from internlm.config.loader import load_config
from internlm.config.schema import Config, MoeConfig
from internlm.config.schema.base import key_info, section_class
from internlm.initialize.build import build_scaler, check_buildable
from internlm.utils.errors import ConfigError

REQUIRED = ("data", "model", "ckpt")

FILE = """\
data = dict(seq_len=16, micro_bsz=2, total_steps=10)
model = dict(vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4, dtype="torch.float32")
ckpt = dict(save_ckpt_folder="runs/x", checkpoint_every=5)
"""


@pytest.fixture
def load(tmp_path):
    (tmp_path / "config.py").write_text(FILE)
    return lambda *overrides: load_config(tmp_path / "config.py", overrides)


def at(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    "text, value, notice",
    [
        ("data.rampup_batch_size=None", "", None),
        ("data.skip_batches=None", "", None),
        ("loss.label_smoothing=None", 0.0, None),
        ("grad_scaler.max_scale=None", None, None),
        ("grad_scaler.fp16.min_scale=None", None, None),
        ("grad_scaler.hysteresis=0", 0, None),
        ("ckpt.oss_snapshot_freq=0", None, None),
        (
            "lr_scheduler.eta_min=1.0",
            1.0,
            "lr_scheduler.eta_min = 1.0 is above adam.lr = 0.0001: after the warm-up the ",
        ),
        ("cpu_offloading.offloading_activations=True", True, None),
        (
            "cpu_offloading.offloading_activations=False",
            False,
            "no effect: cpu_offloading.offloading_activations = False (only activations are moved",
        ),
        ("adam.clip_grad=4.0", 4.0, "no effect: adam.clip_grad = 4.0 (hybrid_zero_optimizer.clip_grad_norm decides)"),
        ("model.attn_drop_rate=0", 0.0, None),
        ("model.drop_rate=0.0", 0.0, None),
        ("model.rope_type=normal", "normal", None),
        ("model.rope_scaling_factor=1", 1.0, None),
        ("model.head_dim=0", None, "model.head_dim = 0 is read as None"),
        ("parallel.pipeline.size=0", 1, "parallel.pipeline.size = 0 is read as 1"),
        ("model.sliding_window=0", None, "model.sliding_window = 0 is read as None"),
        ("data.empty_cache_and_diag_interval=0", 50, "data.empty_cache_and_diag_interval = 0 is read as 50"),
        ("parallel.tensor.mode=None", "mtp", "parallel.tensor.mode = None is read as its default"),
        ("parallel.weight.overlap=None", False, "parallel.weight.overlap = None is read as its default"),
        ("loss.op_type=None", "py_vocab_parallel", "loss.op_type = None is read as its default"),
        ("parallel.pipeline.zero_bubble=False", None, "parallel.pipeline.zero_bubble = False is ignored"),
        ("gradient_handler=[{'type': 'PipelineSharedModuleGradientHandler'}]", ..., None),
        ("data.valid_folder=''", None, "data.valid_folder = '' is read as None"),
        ("ckpt.load_ckpt_info=False", None, "ckpt.load_ckpt_info = False is read as None"),
        ("ckpt.auto_resume=None", True, "ckpt.auto_resume = None is read as its default"),
        ("ckpt.stop_file_path=''", None, "ckpt.stop_file_path = '' is read as None"),
        ("tensorboard_folder=''", None, "tensorboard_folder = '' is read as None"),
        ("moe=dict()", MoeConfig(), None),
        ("fp8=None", None, None),
    ],
)
def test_a_value_is_taken_as_internevo_takes_it(load, text, value, notice):
    loaded = load(text)
    if value is not None and value is not ...:
        assert at(loaded.config, text.split("=")[0]) == value
    told = [line for line in loaded.notices if not is_difference(line)]
    assert len(told) == (0 if notice is None else 1), told
    assert notice is None or told[0].startswith(notice)


def test_packing_into_one_without_packing(load):
    notices = load("data.pack_sample_into_one=True", "data.use_packed_dataset=False").notices
    assert notices == [
        "no effect: data.pack_sample_into_one = True (data.use_packed_dataset = False: nothing is packed)"
    ]


def test_universal_checkpoints_that_are_off_save_as_before(load):
    off = load("ckpt.universal_ckpt=dict(enable=False, aysnc_save=True, broadcast_load=False)")
    assert not off.config.ckpt.async_save and "is ignored, because ckpt.universal_ckpt.enable = False" in off.notices[0]
    assert load("ckpt.universal_ckpt=dict(enable=True, aysnc_save=True)").config.ckpt.async_save


def test_zero_bubble_is_a_schedule(load, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(FILE + "parallel = dict(pipeline=dict(size=2, zero_bubble=True))\n")
    loaded = load_config(path, world_size=2)
    assert loaded.config.parallel.pipeline.mode == "ZBH1"
    assert "parallel.pipeline.zero_bubble = True is read as parallel.pipeline.mode = 'ZBH1'" in loaded.notices


@pytest.mark.parametrize(
    "name", [name for name, field in Config.model_fields.items() if section_class(field) and name not in REQUIRED]
)
def test_a_section_that_is_none_has_its_defaults(load, name):
    assert getattr(load(f"{name}=None").config, name) == getattr(load().config, name)


def test_loss_scales_without_bounds(load):
    unbounded = load("grad_scaler.max_scale=None", "grad_scaler.fp16.min_scale=None", "model.dtype=torch.float16")
    scaler = build_scaler(unbounded.config, torch.device("cpu"))
    assert (scaler.min_scale, scaler.max_scale) == (2.0**-126, 2.0**127)
    with pytest.raises(ConfigError, match=r"grad_scaler\.fp16\.initial_scale = 65536\.0 must be between"):
        load("grad_scaler.fp16.min_scale=None", "grad_scaler.max_scale=4")


@pytest.mark.parametrize(
    "text, feature",
    [
        ("model.attn_drop_rate=0.1", "dropout"),
        ("model.drop_rate=0.1", "dropout"),
        ("model.rope_type=dynamic", "rope_type (use model.rope_scaling instead)"),
        ("model.rope_scaling_factor=4", "rope_scaling_factor (use model.rope_scaling instead)"),
        ("model.use_logn_attn=True", "log-n attention (Qwen 1)"),
        ("model.use_glu=False", "an MLP without a gate"),
        ("model.extra_pred_tokens=1", "extra_pred_tokens (use model.num_nextn_predict_layers instead)"),
        ("parallel.pipeline.use_zeropp=True", "the ZeroPP schedule"),
        ("moe=dict(top_k=2)", "MegaBlocks (use model.num_experts instead)"),
        ("model.moe_gate_k=2", None),
        ("model.moe_layer_kwargs.capacity_factor=1.2", None),
        ("model.num_cross_decoder_layers=4", "models of self- and cross-decoder layers"),
        ("fp8={'margin': 0}", "fp8 by Transformer Engine (use float8 instead)"),
        ("data.type=hf", "this source"),
    ],
)
def test_a_feature_that_is_not_there_is_named(load, text, feature):
    if feature is None:
        load(text)
        return
    with pytest.raises(ConfigError) as error:
        load(text)
    (mistake,) = error.value.mistakes
    assert f": {feature} is not yet supported; " in mistake


def test_an_empty_train_folder_is_not_random_data(load):
    with pytest.raises(ConfigError, match=r"data\.train_folder = '': give a folder, or None for random data"):
        load("data.train_folder=''")


def test_a_reward_head_is_for_the_library(load):
    config = load("model.is_reward=True").config
    with pytest.raises(ConfigError, match=r"model\.is_reward = True: the training loop predicts the next token"):
        check_buildable(config, 1)
    assert key_info(type(config.model).model_fields["is_reward"]).status.value == "library only"
