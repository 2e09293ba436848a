"""The schema: complete, documented, classified, and usable from Python."""

import json
import pickle

import pytest
import torch
from pydantic import ValidationError

from internlm.config.schema import Config, DataConfig, LrSchedulerConfig, ModelConfig
from internlm.config.schema.base import Status, default_of, is_required, key_info, walk_schema, walk_values

# Every key that InternEvo documents, section by section, written down from its documentation and not from our schema.
INTERNEVO_KEYS = {
    "": "JOB_NAME model_type DO_ALERT use_apex_adam use_fp32_norm enable_tb tensorboard_folder resume_tb_folder "
    "cudnn_benchmark cudnn_deterministic metric_dtype output_tf32 selective_checkpoint selective_checkpoint_offload "
    "batch_count TENSOR_SHAPE gradient_handler only_load_lr reduce_comm_dtype fsdp_wrap_cls pad_token_id",
    "cpu_offloading": "enable num_layers",
    "float8": "enable_float8_linear scaling_type_input scaling_type_weight scaling_type_grad_output compile",
    "hf": "cfg cfg_cls cfg_extra_kwargs mod mod_cls",
    "data": "type seq_len micro_bsz micro_num gradient_accumulation packed_length batch_size total_steps min_length "
    "min_length_dict train_folder valid_folder valid_micro_num valid_every skip_batches rampup_batch_size "
    "pack_sample_into_one use_packed_dataset fixed_random_dataset_seqlen empty_cache_and_diag_interval "
    "diag_outlier_ratio use_shm shm_path num_worker seed tokenizer_path content_name subset_name is_multimodal "
    "image_folder image_size patch_size",
    "ckpt": "enable_save_ckpt save_ckpt_folder checkpoint_every oss_snapshot_freq snapshot_ckpt_folder async_upload "
    "async_upload_tmp_folder load_ckpt_info auto_resume stop_file_path enable_internevo2hf_ckpt generate_meta_data",
    "ckpt.load_ckpt_info": "path content ckpt_type",
    "ckpt.universal_ckpt": "enable broadcast_load",
    "grad_scaler": "growth_factor backoff_factor max_scale hysteresis",
    "grad_scaler.fp16": "initial_scale min_scale growth_interval",
    "hybrid_zero_optimizer": "overlap_sync_grad overlap_sync_param reduce_bucket_size clip_grad_norm "
    "use_split_tensor_optim all_gather_size",
    "loss": "label_smoothing moe_loss_coeff op_type mtp_loss_coeff",
    "adam": "lr adam_beta1 adam_beta2 adam_beta2_c adam_eps weight_decay",
    "lr_scheduler": "total_steps init_steps warmup_ratio eta_min last_epoch",
    "beta2_scheduler": "init_beta2 c cur_iter",
    "model": "vocab_size hidden_size num_layers num_attention_heads num_kv_attention_heads head_dim mlp_ratio "
    "multiple_of checkpoint num_chunks dtype norm_type layer_norm_epsilon use_flash_attn qk_interleaved adapt_hf "
    "rope_base use_dynamic_ntk_rope max_position_embeddings use_fp32_rope rotary_type no_bias qkv_bias o_bias mlp_bias "
    "enable_qkv_fusion mlp_layer_fusion embed_split_hidden embed_grad_scale apply_post_layer_norm parallel_output "
    "norm_head dropout_selective_checkpoint residual_in_fp32 use_scaled_init init_type embedding_init_std "
    "attn_wqkv_init_std attn_other_init_std ffn_uplayer_init_std ffn_other_init_std out_head_init_std "
    "use_sliding_window sliding_window max_window_layers is_reward num_experts top_k num_shared_experts moe_type "
    "device",
    "model.inject_info": "inject interactive modules reset_params extra_linear2newlinear data_helper",
    "parallel": "sequence_parallel",
    "parallel.zero1": "size fsdp",
    "parallel.tensor": "size mode",
    "parallel.pipeline": "size interleaved_overlap mode",
    "parallel.weight": "size overlap launch_allgather_before forward_overlap_per early_reduce_scatter_release "
    "layer_fuse_isp_comm memory_pool",
    "parallel.expert_weight": "size overlap launch_allgather_before forward_overlap_per early_reduce_scatter_release "
    "layer_fuse_isp_comm",
    "parallel.expert": "size no_tp",
    "parallel.expert_zero1": "size",
    "parallel.sequence_2D": "enable head_size context_size window_size",
    "parallel.sequence_2D.device_placement_strategy": "head_first interleaved",
    "parallel.fsdp": "enable mode init_method",
    "model.moe_layer_kwargs": "capacity_factor eval_capacity_factor min_capacity noisy_gate_policy drop_tokens use_rts "
    "use_fused_gating use_grouped_mlp drop_and_pad drop_policy enable_fused_permute token_dispatch_policy "
    "deterministic_mode aux_loss_by_layer normalize_expert_weights scoring_func routed_scaling_factor",
    "monitor.alert": "enable_feishu_alert feishu_alert_address light_monitor_address alert_file_path",
    "tensorboard": "queue_max_length",
    "generation": "ckpt_folder output_folder data_folder batch_size eos_id bos_id max_length do_sample temperature "
    "num_beams top_k top_p repetition_penalty length_penalty additional_eos_token_list",
}
SHAPE = dict(vocab_size=64, hidden_size=32, num_layers=2, num_attention_heads=4)


def small(**sections):
    data = sections.pop("data", DataConfig(seq_len=16, micro_bsz=2, total_steps=10))
    return Config(model=sections.pop("model", ModelConfig(**SHAPE)), data=data, **sections)


def test_every_key_of_internevo_is_known():
    ours = {path for path, _ in walk_schema(Config)}
    theirs = {
        f"{section}.{name}" if section else name for section, names in INTERNEVO_KEYS.items() for name in names.split()
    }
    assert theirs - ours == set()


def test_every_key_is_documented_and_classified():
    for path, field in walk_schema(Config):
        info = key_info(field)
        assert info is not None, f"{path} says nothing about what is done with it"
        assert field.description, f"{path} has no documentation"
        assert info.detail or info.status is Status.SUPPORTED, f"{path} gives no reason"


def test_every_key_of_the_model_says_whether_it_changes_outputs():
    for path, field in walk_schema(Config):
        if path.startswith("model.") or path == "model_type":
            assert key_info(field).changes_outputs is not None, f"{path}: say changes_outputs=True or False"
        else:
            assert not key_info(field).changes_outputs, path


def test_dependent_keys_name_a_key_that_is_there():
    known = {path for path, _ in walk_schema(Config)}
    for path, field in walk_schema(Config):
        info = key_info(field)
        if info.status is Status.DEPENDENT and "*" not in info.detail:
            assert info.detail in known, path


def test_defaults_fit_their_types():
    """Each default, given explicitly, is accepted and stays the same."""
    config = small()
    for path, field, value in walk_values(config):
        if is_required(field) or key_info(field).derived:
            continue
        tree = config.model_dump(exclude_unset=True)
        place = tree
        *outer, name = path.split(".")
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = default_of(field)
        rebuilt = Config.model_validate(tree)
        assert {p: v for p, _, v in walk_values(rebuilt)}[path] == value, path


def test_only_what_has_no_default_is_required():
    required = {path for path, field in walk_schema(Config) if is_required(field)}
    assert required == {
        "data.seq_len",
        "data.micro_bsz",
        "data.total_steps",
        "data.fim.rate",
        "data.fim.prefix",
        "data.fim.middle",
        "data.fim.suffix",
        "model.vocab_size",
        "model.hidden_size",
        "model.num_layers",
        "model.num_attention_heads",
        "model.rope_scaling.type",
    }


def test_derived_values():
    config = small(
        data=DataConfig(seq_len=16, micro_bsz=3, micro_num=5, total_steps=10, packed_length=7, valid_micro_num=None),
        adam=dict(adam_beta2=0.9, adam_beta2_c=0.8),
        parallel=dict(tensor=dict(mode="isp"), sequence_parallel=False),
    )
    assert (config.data.packed_length, config.data.batch_size) == (48, 5)
    assert (config.data.gradient_accumulation, config.data.valid_micro_num) == (5, 5)
    assert config.lr_scheduler.total_steps == 10
    assert (config.beta2_scheduler.init_beta2, config.beta2_scheduler.c) == (0.9, 0.8)
    assert config.parallel.sequence_parallel is True


def test_derived_values_do_not_touch_what_the_caller_holds():
    mine = LrSchedulerConfig(warmup_ratio=0.5)
    assert small(lr_scheduler=mine).lr_scheduler.total_steps == 10
    assert mine.total_steps is None


def test_given_values_win_over_derived_ones():
    config = small(lr_scheduler=LrSchedulerConfig(total_steps=99), beta2_scheduler=dict(init_beta2=0.5, c=0.1))
    assert config.lr_scheduler.total_steps == 99
    assert (config.beta2_scheduler.init_beta2, config.beta2_scheduler.c) == (0.5, 0.1)


def test_the_schema_is_json_for_editors():
    schema = json.loads(json.dumps(Config.model_json_schema()))
    assert schema["$defs"]["DataConfig"]["properties"]["seq_len"]["internlm"]["status"] == "supported"


def test_a_config_travels_between_processes():
    config = small()
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_config_does_not_change():
    config = small()
    with pytest.raises(ValidationError, match="frozen"):
        config.model.vocab_size = 3


def test_unknown_keys_are_errors_in_python_too():
    with pytest.raises(ValidationError, match="vocabsize"):
        ModelConfig(**SHAPE, vocabsize=3)


@pytest.mark.parametrize(
    "name, dtype, tf32",
    [
        ("torch.bfloat16", torch.bfloat16, False),
        ("torch.half", torch.float16, False),
        ("torch.float16", torch.float16, False),
        ("torch.float32", torch.float32, False),
        ("torch.tf32", torch.float32, True),
        (torch.float16, torch.float16, False),
    ],
)
def test_dtype(name, dtype, tf32):
    model = ModelConfig(**SHAPE, dtype=name)
    assert (model.torch_dtype, model.uses_tf32) == (dtype, tf32)


def test_bfloat16_is_the_default():
    assert ModelConfig(**SHAPE).torch_dtype is torch.bfloat16


@pytest.mark.parametrize(
    "hidden, ratio, multiple, published",
    [
        (4096, 8 / 3, 256, 11008),  # InternLM 7B, Llama 7B
        (5120, 8 / 3, 256, 13824),  # InternLM 20B
        (6144, 8 / 3, 256, 16384),  # InternLM2 20B
        (4096, 3.5, 256, 14336),  # InternLM2 7B
        (2048, 4, 128, 8192),  # InternLM2 1.8B
        (3584, 5.25, 256, 18944),  # Qwen2 7B
        (2048, 768 / 2048, 256, 768),  # Qwen3 30B-A3B, one expert
        (3072, 8, 256, 24576),  # Gemma 7B
    ],
)
def test_width_of_the_mlp_is_the_published_one(hidden, ratio, multiple, published):
    model = ModelConfig(**SHAPE | dict(hidden_size=hidden), mlp_ratio=ratio, multiple_of=multiple)
    assert model.ffn_size == published
    assert ModelConfig(**SHAPE, mlp_ratio=ratio, intermediate_size=100).ffn_size == 100


@pytest.mark.parametrize("given, share", [(True, 1.0), (False, 0.0), (0.25, 0.25), (1, 1.0)])
def test_checkpoint_is_a_share(given, share):
    value = ModelConfig(**SHAPE, checkpoint=given).checkpoint
    assert type(value) is float and value == share


def test_selective_checkpoint_is_an_older_spelling():
    tree = {"model": SHAPE, "data": dict(seq_len=16, micro_bsz=2, total_steps=10)}
    assert Config.model_validate(tree).model.checkpoint_save_policy == "nothing"
    config = Config.model_validate({**tree, "selective_checkpoint": True})
    assert config.model.checkpoint_save_policy == "attention"
    assert Config.model_validate(config.model_dump()).model.checkpoint_save_policy == "attention"
    assert SHAPE.get("checkpoint_save_policy") is None and "checkpoint_save_policy" not in config.model.model_fields_set


def test_qk_interleaved_follows_adapt_hf():
    assert ModelConfig(**SHAPE).qk_interleaved is False
    assert ModelConfig(**SHAPE, adapt_hf=False).qk_interleaved is True
    assert ModelConfig(**SHAPE, adapt_hf=True).qk_interleaved is False


@pytest.mark.parametrize("mode", ["zbv", "DualPipeV"])
def test_pipeline_modes_in_any_case_and_the_chunks_of_a_v(mode):
    config = small(parallel=dict(pipeline=dict(size=2, mode=mode)))
    assert config.parallel.pipeline.mode == mode.upper()
    assert config.model.num_chunks == 2
    assert small(parallel=dict(pipeline=dict(size=1, mode=mode))).model.num_chunks == 1


def test_chunks_are_for_pipelines():
    model = ModelConfig(**SHAPE, num_chunks=3)
    assert small(model=model, parallel=dict(pipeline=dict(size=2))).model.num_chunks == 3
    assert small(model=model).model.num_chunks == 1
    assert model.num_chunks == 3


def test_layers_of_each_stage_are_a_word_or_a_list():
    def split(value):
        return small(parallel=dict(pipeline=dict(layer_split=value))).parallel.pipeline.layer_split

    assert [split("uniform"), split("cost"), split([3, 1])] == ["uniform", "cost", (3, 1)]
    with pytest.raises(ValidationError, match="uniform"):
        split("even")


def test_infinite_intervals_are_never():
    ckpt = small(ckpt=dict(checkpoint_every=float("inf"), oss_snapshot_freq="inf")).ckpt
    assert ckpt.checkpoint_every is None and ckpt.oss_snapshot_freq is None


def test_numbers_are_finite():
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValidationError, match="finite number"):
            small(adam=dict(lr=value))
    # As others write "no clipping".
    assert small(hybrid_zero_optimizer=dict(clip_grad_norm=float("inf"))).hybrid_zero_optimizer.clip_grad_norm > 0


def test_load_info_without_path_loads_nothing():
    assert small(ckpt=dict(load_ckpt_info=dict(path=None))).ckpt.load_ckpt_info is None
    one = small(ckpt=dict(load_ckpt_info=dict(path="x", content="all"))).ckpt.load_ckpt_info
    assert one.content == ("all",)


def test_a_window_over_the_node_or_the_context_is_not_interleaved():
    def interleaved(**two):
        strategy = dict(head_first=False, interleaved=True)
        part = small(parallel=dict(sequence_2D=dict(enable=True, device_placement_strategy=strategy, **two)))
        return part.parallel.sequence_2D.device_placement_strategy.interleaved

    assert interleaved(context_size=4, window_size=2) is True
    assert interleaved(context_size=4, window_size=4) is False
    assert interleaved(context_size=16, window_size=8) is False
