"""A config as InternEvo's users have it, with all its habits, loads as it is."""

import pytest
from helpers.internevo_configs import is_difference

from internlm.config.loader import load_config
from internlm.utils.errors import ConfigError

INTERNEVO_7B = """\
import os

JOB_NAME = "my_7b"
model_type = "INTERNLM"
DO_ALERT = False

SEQ_LEN = 2048
HIDDEN_SIZE = 4096
NUM_ATTENTION_HEAD = 32
MLP_RATIO = 8 / 3
NUM_LAYER = 32
VOCAB_SIZE = 103168

MODEL_ONLY_FOLDER = "local:pretrained/step_100"
SAVE_CKPT_FOLDER = f"local:{os.path.join('ckpts', JOB_NAME)}"
LOAD_CKPT_FOLDER = "local:ckpts/49"
CHECKPOINT_EVERY = 50
ckpt = dict(
    enable_save_ckpt=False,
    enable_internevo2hf_ckpt=False,
    save_ckpt_folder=SAVE_CKPT_FOLDER,
    load_ckpt_folder="local:ckpts/",
    load_ckpt_info=dict(path=MODEL_ONLY_FOLDER, content=("model",), ckpt_type="internevo"),
    auto_resume=True,
    checkpoint_every=CHECKPOINT_EVERY,
    async_upload=True,
    async_upload_tmp_folder="/dev/shm/internlm_tmp_ckpt/",
    oss_snapshot_freq=int(CHECKPOINT_EVERY / 2),
)

TRAIN_FOLDER = None
VALID_FOLDER = None
data = dict(
    seq_len=SEQ_LEN,
    micro_num=4,
    micro_bsz=2,
    packed_length=2 * SEQ_LEN,
    valid_micro_num=4,
    valid_every=50,
    pack_sample_into_one=False,
    total_steps=50000,
    skip_batches="",
    rampup_batch_size="",
    min_length=50,
    train_folder=TRAIN_FOLDER,
    valid_folder=VALID_FOLDER,
    empty_cache_and_diag_interval=200,
    diag_outlier_ratio=1.1,
    use_shm=False,
)

grad_scaler = dict(
    fp16=dict(initial_scale=2**16, min_scale=1, growth_interval=1000),
    growth_factor=2,
    backoff_factor=0.5,
    max_scale=2**24,
    hysteresis=2,
)

hybrid_zero_optimizer = dict(
    overlap_sync_grad=True,
    overlap_sync_param=False,
    reduce_bucket_size=512 * 1024 * 1024,
    clip_grad_norm=1.0,
    use_split_tensor_optim=False,
    all_gather_size=512 * 1024 * 1024,
)

loss = dict(label_smoothing=0)

adam = dict(lr=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_beta2_c=0, adam_eps=1e-8, weight_decay=0.01)

lr_scheduler = dict(total_steps=data["total_steps"], init_steps=0, warmup_ratio=0.01, eta_min=1e-5, last_epoch=-1)

beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=adam["adam_beta2_c"], cur_iter=-1)

use_fp32_norm = False
model = dict(
    checkpoint=False,
    num_attention_heads=NUM_ATTENTION_HEAD,
    embed_split_hidden=True,
    vocab_size=VOCAB_SIZE,
    embed_grad_scale=1,
    parallel_output=True,
    hidden_size=HIDDEN_SIZE,
    num_layers=NUM_LAYER,
    mlp_ratio=MLP_RATIO,
    apply_post_layer_norm=False,
    dtype="torch.bfloat16",
    norm_type="rmsnorm",
    layer_norm_epsilon=1e-5,
    use_flash_attn=True,
    num_chunks=1,
)

parallel = dict(
    zero1=dict(size=-1, fsdp=False),
    tensor=dict(size=1, mode="mtp"),
    pipeline=dict(size=1, interleaved_overlap=True),
    weight=dict(size=1, overlap=True, memory_pool=True),
)

cudnn_deterministic = False
cudnn_benchmark = False

grad_profiling = dict(
    grad_norm_profiling=False,
    zero_grad_profiling=False,
    layers=["Linear"],
    vocab_grad_norm_profiling=False,
    interval_steps=5,
)

monitor = dict(
    alert=dict(
        enable_feishu_alert=DO_ALERT,
        feishu_alert_address=None,
        light_monitor_address=None,
        alert_file_path=f"alerts/{JOB_NAME}.log",
    ),
    tensorboard=dict(queue_max_length=10),
)

generation = dict(
    ckpt_folder="ckpts/50",
    output_folder="texts",
    batch_size=1,
    eos_id=[2, 0],
    bos_id=1,
    max_length=100,
    do_sample=True,
    temperature=1.0,
    top_k=50,
    top_p=1.0,
    repetition_penalty=1,
    length_penalty=1.0,
)
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "7B.py").write_text(INTERNEVO_7B)
    return tmp_path / "7B.py"


@pytest.mark.parametrize("world_size", [1, 8, 24])
def test_it_loads_unchanged(path, world_size):
    config = load_config(path, world_size=world_size).config
    assert config.JOB_NAME == "my_7b"
    assert config.model.ffn_size == 11008
    assert config.data.packed_length == 4096
    assert config.lr_scheduler.total_steps == 50000 and config.lr_scheduler.eta_min == 1e-5
    assert config.tensorboard.queue_max_length == 10
    assert config.ckpt.save_ckpt_folder == "local:ckpts/my_7b"
    assert config.ckpt.load_ckpt_info.path == "local:pretrained/step_100"
    assert config.generation.eos_id == (2, 0)


def test_each_habit_gets_one_notice(path):
    notices = load_config(path).notices
    assert notices[:2] == [
        "monitor.tensorboard is read as tensorboard",
        "ckpt.load_ckpt_folder is ignored, because ckpt.load_ckpt_info is given",
    ]
    assert (
        "no effect: ckpt.async_upload_tmp_folder = '/dev/shm/internlm_tmp_ckpt/' (uploads start from memory)" in notices
    )
    assert "no effect: ckpt.oss_snapshot_freq, ckpt.async_upload (saving is off)" in notices
    assert sum(notice.startswith("no effect: generation.ckpt_folder") for notice in notices) == 1
    assert (
        "no effect: parallel.pipeline.interleaved_overlap = True (messages always overlap with computation)" in notices
    )
    for part in (
        "parallel.weight.overlap = True, parallel.weight.memory_pool = True (parallel.weight.size = 1)",
        "monitor.alert.alert_file_path = 'alerts/my_7b.log' (monitor.alert.enable_feishu_alert = False)",
        "grad_profiling.layers = ('Linear',), grad_profiling.interval_steps = 5 (grad_profiling.*_profiling = False)",
    ):
        assert f"no effect: {part}" in notices
    assert any(notice.startswith("no effect: data.valid_every = 50 (data.valid_folder is None") for notice in notices)
    assert any(
        notice.startswith("no effect: ckpt.auto_resume = True (ckpt.enable_save_ckpt = False") for notice in notices
    )
    assert sum(not is_difference(notice) for notice in notices) == 11


def test_defaults_that_make_it_another_run_are_told(path):
    told = [notice for notice in load_config(path).notices if is_difference(notice)]
    keys = ["reduce_comm_dtype", "adam.weight_decay_norms_and_biases"]
    assert [notice.split(" not set")[0] for notice in told[:2]] == keys
    assert told[-2].startswith("ckpt.load_ckpt_info: 'local:pretrained/step_100' is loaded when there is nothing")
    assert told[-1] == "all differences from InternEvo are listed in doc/from_internevo.md" and len(told) == 4
    path.write_text(
        path.read_text()
        + "ckpt.update(load_ckpt_info=None, load_ckpt_folder=None)\nmodel_type = 'GEMMA'\nmodel['no_bias'] = True\n"
        "reduce_comm_dtype = 'torch.float32'\nadam['weight_decay_norms_and_biases'] = True\n"
    )
    told = [notice.split(" not set")[0] for notice in load_config(path).notices if is_difference(notice)]
    assert told[:-1] == ["model.use_scaled_init", "model.tie_word_embeddings", "model.add_unit_offset"]


def test_older_forms_of_the_parallel_section(path):
    path.write_text(INTERNEVO_7B + "parallel = dict(zero1=8, tensor=1, pipeline=1, sequence_parallel=False)\n")
    config = load_config(path, world_size=16).config
    assert (config.parallel.zero1.size, config.parallel.tensor.size) == (8, 1)


def test_what_it_may_ask_for_that_is_not_there_yet(path):
    path.write_text(
        INTERNEVO_7B
        + "ckpt.update(enable_save_ckpt=True, stop_file_path='stop')\n"
        + "model.update(num_experts=8, top_k=2, drop_rate=0.1)\n"
        + "parallel['tensor'] = dict(size=4, mode='isp')\n"
        + "monitor['alert']['enable_feishu_alert'] = True\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(path, world_size=8)
    keys = {mistake.split(": ")[1].split(" = ")[0] for mistake in error.value.mistakes}
    assert all("not yet supported" in mistake for mistake in error.value.mistakes)
    assert keys == {
        "model.drop_rate",
        "monitor.alert.enable_feishu_alert",
    }


@pytest.mark.parametrize(
    "folder, in_background", [("local:x", False), ("x", False), ("memory://bucket/x", True)], ids=str
)
def test_async_upload_is_for_object_stores(path, folder, in_background):
    path.write_text(INTERNEVO_7B + f"ckpt.update(enable_save_ckpt=True, save_ckpt_folder={folder!r})\n")
    loaded = load_config(path)
    assert loaded.config.ckpt.saves_in_background is in_background
    told = [notice for notice in loaded.notices if notice.startswith("no effect: ckpt.async_upload = True")]
    assert len(told) == (0 if in_background else 1)
