"""Each rule: what it refuses (with the key to mend), and that it stays silent on the nearest good neighbour."""

import re

import pytest
from helpers.configs import small_config

from internlm.config.rules import data_ranks, find_problems, weight_data_ranks
from internlm.config.schema import Config
from internlm.config.schema.base import walk_schema

TWO = "parallel.sequence_2D."
SAVING = {"ckpt.enable_save_ckpt": True, "ckpt.save_ckpt_folder": "x", "ckpt.checkpoint_every": 5}

FIM = {"rate": 0.5, "prefix": 1, "middle": 2, "suffix": 3, "bos": None, "eos": 0}

# changes, world size, first key of the only mistake (None: there is none).
CAPACITY = "model.moe_layer_kwargs"
MOE = {"model_type": "MIXTRALMOE", "model.num_experts": 4, "model.top_k": 2, "model.moe_type": "Dropless"}

CASES = [
    ({}, 1, None),
    # Layers that predict later tokens.
    ({"model.num_nextn_predict_layers": 1}, 1, None),
    (
        {"model.num_nextn_predict_layers": 1, "data.packing": "pack_sample_into_one"},
        1,
        "model.num_nextn_predict_layers",
    ),
    ({"data.packing": "pack_sample_into_one"}, 1, None),
    ({"model.num_nextn_predict_layers": 1, "data.packing": "unpacked", "data.use_packed_dataset": False}, 1, None),
    # 2 (schema), 3: FSDP and pipelines.
    ({"parallel.fsdp.enable": True, "parallel.pipeline.size": 2}, 2, "parallel.fsdp.enable"),
    ({"parallel.zero1.fsdp": True, "parallel.pipeline.size": 2}, 2, "parallel.zero1.fsdp"),
    ({"parallel.zero1.fsdp": True}, 2, None),
    # 5.
    ({"data.gradient_accumulation": 4}, 1, "data.gradient_accumulation"),
    ({"data.gradient_accumulation": 8}, 1, None),
    ({"data.gradient_accumulation": 4, "parallel.pipeline.size": 2}, 2, None),
    # Keys of token arrays.
    ({"data.array_dtype": "uint16"}, 1, "data.array_dtype"),
    ({"data.type": "megatron", "data.array_separator": 0}, 1, "data.array_separator"),
    ({"data.type": "arrays", "data.array_dtype": "uint16", "data.array_separator": 0}, 1, None),
    # 6.
    ({"ckpt.enable_save_ckpt": True, "ckpt.checkpoint_every": 5}, 1, "ckpt.save_ckpt_folder"),
    ({"ckpt.enable_save_ckpt": True, "ckpt.save_ckpt_folder": "x"}, 1, "ckpt.checkpoint_every"),
    (
        {"ckpt.enable_save_ckpt": True, "ckpt.save_ckpt_folder": "x", "ckpt.checkpoint_every": 0},
        1,
        "ckpt.checkpoint_every",
    ),
    ({"ckpt.enable_save_ckpt": True, "ckpt.save_ckpt_folder": "x", "ckpt.checkpoint_every": 1}, 1, None),
    ({**SAVING, "ckpt.oss_snapshot_freq": -1}, 1, "ckpt.oss_snapshot_freq"),
    ({**SAVING, "ckpt.oss_snapshot_freq": 0}, 1, None),
    ({**SAVING, "ckpt.oss_snapshot_freq": 1}, 1, None),
    ({**SAVING, "ckpt.snapshot_ckpt_folder": "x"}, 1, "ckpt.snapshot_ckpt_folder"),
    ({**SAVING, "ckpt.snapshot_ckpt_folder": "x/snapshot"}, 1, None),
    ({"ckpt.save_ckpt_folder": "s4://bucket/key"}, 1, "ckpt.save_ckpt_folder"),
    ({"ckpt.load_ckpt_info": {"path": "x", "ckpt_type": "internlm_test"}}, 1, "ckpt.load_ckpt_info.ckpt_type"),
    ({"ckpt.load_ckpt_info": {"path": "x", "ckpt_type": "internlm2_test"}}, 1, "ckpt.load_ckpt_info.ckpt_type"),
    ({"ckpt.load_ckpt_info": {"path": "x", "ckpt_type": "hf"}}, 1, None),
    ({"ckpt.allow_model_changes": ("model.rope_base", "model.rope_scaling")}, 1, None),
    ({"ckpt.allow_model_changes": ("model.dtype",)}, 1, "ckpt.allow_model_changes"),
    ({"ckpt.save_ckpt_folder": "local:x"}, 1, None),
    ({"ckpt.save_ckpt_folder": "memory://x"}, 1, None),
    ({"ckpt.snapshot_ckpt_folder": "s4://bucket/key"}, 1, "ckpt.snapshot_ckpt_folder"),
    ({"ckpt.load_ckpt_info": dict(path="s4://bucket/key")}, 1, "ckpt.load_ckpt_info.path"),
    ({"ckpt.stop_file_path": "memory://x"}, 1, "ckpt.stop_file_path"),
    ({"ckpt.stop_file_path": "local:x"}, 1, None),
    # 9.
    ({"model.adapt_hf": True, "model.qk_interleaved": True}, 1, "model.adapt_hf"),
    ({"model.adapt_hf": False, "model.qk_interleaved": False}, 1, "model.adapt_hf"),
    ({"model.adapt_hf": False, "model.qk_interleaved": True}, 1, None),
    # 10.
    ({"parallel.fsdp.enable": True, "parallel.tensor.mode": "isp"}, 2, "parallel.fsdp.enable"),
    # 14.
    ({"parallel.weight.size": 2}, 2, "parallel.weight.size"),
    ({"parallel.weight.size": 2, "parallel.tensor.mode": "isp"}, 2, None),
    # 19, which asks for isp in InternEvo.
    ({"selective_checkpoint": True}, 1, None),
    ({"selective_checkpoint": True, "model.checkpoint": 1, "model.checkpoint_save_policy": "attention"}, 1, None),
    ({"selective_checkpoint": True, "model.checkpoint_save_policy": "matmuls"}, 1, "selective_checkpoint"),
    ({"selective_checkpoint": True, "model.checkpoint_save_policy": "nothing"}, 1, "selective_checkpoint"),
    ({"selective_checkpoint_offload": True}, 1, "selective_checkpoint_offload"),
    ({"selective_checkpoint_offload": True, "model.checkpoint_save_policy": "attention"}, 1, None),
    (
        {
            "selective_checkpoint": True,
            "selective_checkpoint_offload": True,
            "parallel.tensor.mode": "isp",
            "parallel.weight.launch_allgather_before": "wqkv",
        },
        1,
        None,
    ),
    (
        {"selective_checkpoint": True, "selective_checkpoint_offload": True, "model.compile": True},
        1,
        "selective_checkpoint_offload",
    ),
    ({"selective_checkpoint": True, "model.compile": True}, 1, None),
    ({"model.checkpoint_budget": 1.5}, 1, None),
    ({"model.checkpoint_budget": 1.5, "model.checkpoint": True}, 1, "model.checkpoint_budget"),
    ({"model.checkpoint_budget": 1.5, "model.checkpoint_save_policy": "matmuls"}, 1, "model.checkpoint_budget"),
    ({"model.checkpoint_budget": 1.5, "selective_checkpoint": True}, 1, "model.checkpoint_budget"),
    ({"model.checkpoint_budget": 1.5, "cpu_offloading.enable": True}, 1, "model.checkpoint_budget"),
    # 20.
    ({**MOE, "parallel.fsdp.enable": True}, 4, None),
    (
        {
            **MOE,
            "hybrid_zero_optimizer.overlap_sync_grad": True,
            "hybrid_zero_optimizer.overlap_sync_param": True,
        },
        4,
        None,
    ),
    ({**MOE, "parallel.zero1.size": 2}, 4, None),
    ({"model.num_experts": 4}, 4, None),
    ({**MOE, CAPACITY: {"eval_capacity_factor": 1.0}}, 4, f"{CAPACITY}.eval_capacity_factor"),
    ({**MOE, CAPACITY: {"drop_and_pad": True}}, 4, f"{CAPACITY}.drop_and_pad"),
    ({**MOE, CAPACITY: {"drop_and_pad": True, "capacity_factor": 1.0, "min_capacity": 2}}, 4, None),
    ({**MOE, CAPACITY: {"drop_tokens": True}}, 4, f"{CAPACITY}.drop_tokens"),
    ({**MOE, CAPACITY: {"drop_tokens": False, "use_rts": False}}, 4, None),
    ({**MOE, "model.moe_type": "MegaBlock-D", CAPACITY: {"min_capacity": 2}}, 4, f"{CAPACITY}.min_capacity"),
    ({**MOE, "model.moe_type": "MegaBlock", CAPACITY: {"min_capacity": 2}}, 4, None),
    ({**MOE, "model.moe_type": "GShard", CAPACITY: {"drop_policy": "position"}}, 4, f"{CAPACITY}.drop_policy"),
    ({**MOE, "model.top_k": 5}, 4, "model.top_k"),
    ({**MOE, "parallel.expert.size": 2, "parallel.expert_zero1.size": 2}, 4, None),
    ({**MOE, "parallel.expert.size": 2, "parallel.expert_zero1.size": 4}, 4, "parallel.expert_zero1.size"),
    ({**MOE, "parallel.expert.size": 2, "parallel.tensor.size": 4, "data.seq_len": 2049}, 4, "data.seq_len"),
    ({**MOE, "parallel.expert.size": 1, "parallel.tensor.size": 4, "data.seq_len": 2049}, 4, None),
    ({"parallel.expert.size": 2}, 4, "parallel.expert.size"),
    ({"parallel.expert_weight.size": 2}, 4, "parallel.expert_weight.size"),
    ({**MOE, "parallel.expert_weight.size": 2}, 4, "parallel.expert_weight.size"),
    ({**MOE, "parallel.tensor.mode": "isp", "parallel.expert_weight.size": 4}, 4, None),
    ({**MOE, "parallel.tensor.mode": "isp", "parallel.expert_weight.size": 3}, 4, "parallel.expert.size"),
    ({**MOE, "parallel.expert.no_tp": False, "parallel.tensor.size": 4, "data.seq_len": 2049}, 4, "data.seq_len"),
    (
        {**MOE, "parallel.expert.no_tp": False, "parallel.tensor.size": 2, "model.intermediate_size": 33},
        4,
        "parallel.expert.no_tp",
    ),
    ({"parallel.expert.size": 1}, 4, None),
    ({**MOE, "moe.replay.write": "routing"}, 4, None),
    ({**MOE, "moe.replay.read": "local:routing"}, 4, None),
    ({"moe.replay.write": "routing"}, 4, "moe.replay.write"),
    ({"moe.replay.read": "routing"}, 4, "moe.replay.read"),
    ({**MOE, "moe.replay.write": "s3://routing"}, 4, "moe.replay.write"),
    ({**MOE, "moe.replay.write": "routing", "moe.replay.read": "routing"}, 4, "moe.replay.write"),
    # 21.
    (
        {
            TWO + "enable": True,
            "parallel.tensor.mode": "isp",
            TWO + "head_size": 2,
            TWO + "context_size": 4,
            "data.use_packed_dataset": False,
        },
        8,
        TWO + "head_size",
    ),
    (
        {
            TWO + "enable": True,
            "parallel.tensor.mode": "isp",
            TWO + "head_size": 2,
            TWO + "context_size": 2,
            TWO + "device_placement_strategy.interleaved": True,
            "parallel.tensor.size": 4,
            "data.use_packed_dataset": False,
        },
        4,
        TWO + "device_placement_strategy.interleaved",
    ),
    (
        {TWO + "enable": True, "parallel.tensor.mode": "isp", TWO + "context_size": 4, "parallel.tensor.size": 4},
        4,
        None,
    ),
    (
        {
            TWO + "enable": True,
            "parallel.tensor.mode": "isp",
            TWO + "context_size": 4,
            TWO + "window_size": 3,
            "parallel.tensor.size": 4,
            "data.use_packed_dataset": False,
        },
        4,
        TWO + "window_size",
    ),
    (
        {
            TWO + "enable": True,
            "parallel.tensor.mode": "isp",
            TWO + "head_size": 2,
            TWO + "context_size": 2,
            "parallel.tensor.size": 4,
            "data.use_packed_dataset": False,
        },
        4,
        None,
    ),
    ({TWO + "enable": True, TWO + "context_size": 4, "parallel.tensor.size": 4}, 4, TWO + "enable"),
    (
        {
            TWO + "enable": True,
            "parallel.tensor.mode": "isp",
            TWO + "context_size": 4,
            "parallel.tensor.size": 4,
            "parallel.context.size": 2,
        },
        8,
        "parallel.context.size",
    ),
    ({"parallel.context.size": 4}, 8, None),
    ({"parallel.context.size": 3}, 8, "parallel.tensor.size"),
    ({"parallel.context": {"size": 4, "window_size": 3}}, 4, "parallel.context.window_size"),
    ({"parallel.context": {"size": 4, "window_size": 2, "exchange": "direct"}}, 4, "parallel.context.exchange"),
    ({"parallel.context": {"size": 4, "window_size": 2, "exchange": "ring"}}, 4, None),
    # 22.
    ({"parallel.zero1.size": 3}, 8, "parallel.zero1.size"),
    ({"parallel.zero1.size": 16}, 8, "parallel.zero1.size"),
    ({"parallel.zero1.size": 8}, 8, None),
    ({"parallel.zero1.size": 0}, 8, None),
    ({"parallel.zero1.size": 8, "parallel.tensor.size": 2}, 8, "parallel.zero1.size"),
    # isp: sequence groups do not shrink the ranks with the same weights, weight groups do.
    ({"parallel.zero1.size": 8, "parallel.tensor.size": 2, "parallel.tensor.mode": "isp"}, 8, None),
    (
        {"parallel.zero1.size": 8, "parallel.weight.size": 2, "parallel.tensor.mode": "isp"},
        8,
        "parallel.zero1.size",
    ),
    # 23.
    ({**MOE, "parallel.expert.size": 3}, 12, "model.num_experts"),
    ({**MOE, "model.num_experts": 6}, 4, None),
    ({**MOE, "model.num_experts": 8}, 4, None),
    ({**MOE, "model.num_experts": 2}, 4, None),
    # 24.
    ({"parallel.tensor.size": 2}, 3, "parallel.tensor.size"),
    ({"parallel.tensor.size": 2, "parallel.pipeline.size": 2}, 6, "parallel.tensor.size"),
    ({"parallel.weight.size": 4, "parallel.tensor.mode": "isp"}, 6, "parallel.weight.size"),
    ({**MOE, "model.num_experts": 8, "parallel.expert.size": 8}, 4, "parallel.expert.size"),
    # Ours.
    ({"data.skip_batches": "2-5,7"}, 1, None),
    ({"data.skip_batches": "5-2"}, 1, "data.skip_batches"),
    ({"data.skip_batches": "2;5"}, 1, "data.skip_batches"),
    ({"data.rampup_batch_size": "2 2 100"}, 1, None),
    ({"data.rampup_batch_size": "2 2"}, 1, "data.rampup_batch_size"),
    ({"data.rampup_batch_size": "0 2 100"}, 1, "data.rampup_batch_size"),
    ({"data.rampup_batch_size": "9 2 100"}, 1, "data.rampup_batch_size"),
    ({"data.pack_sample_into_one": True}, 1, None),
    ({"data.pack_sample_into_one": True, "data.use_packed_dataset": False}, 1, None),
    ({"model.num_attention_heads": 5}, 1, "model.hidden_size"),
    ({"model.num_attention_heads": 5, "model.head_dim": 8}, 1, None),
    ({"model.num_kv_attention_heads": 3}, 1, "model.num_kv_attention_heads"),
    ({"model.num_kv_attention_heads": 2}, 1, None),
    ({"model.use_sliding_window": True}, 1, "model.sliding_window"),
    ({"model.use_sliding_window": True, "model.sliding_window": 4}, 1, None),
    (
        {
            "model.use_dynamic_ntk_rope": True,
            "model.rope_scaling": dict(type="linear", factor=2, original_max_position_embeddings=2048),
        },
        1,
        "model.use_dynamic_ntk_rope",
    ),
    ({"model.no_bias": True, "model.qkv_bias": True}, 1, "model.qkv_bias"),
    ({"model.no_bias": True, "model.qkv_bias": False}, 1, None),
    ({"lr_scheduler.eta_min": 1.0}, 1, None),
    (
        {"lr_scheduler.type": "wsd", "lr_scheduler.decay_ratio": 0.8, "lr_scheduler.warmup_ratio": 0.3},
        1,
        "lr_scheduler.decay_ratio",
    ),
    ({"lr_scheduler.decay_ratio": 0.8, "lr_scheduler.warmup_ratio": 0.3}, 1, None),
    ({"model.dtype": "torch.float32", "reduce_comm_dtype": "torch.bfloat16"}, 1, "reduce_comm_dtype"),
    ({"model.dtype": "torch.float32", "reduce_comm_dtype": "torch.float32"}, 1, None),
    ({"reduce_comm_dtype": "torch.float32"}, 1, None),
    *(
        (
            {"model.dtype": dtype, "hybrid_zero_optimizer.grad_accumulation_dtype": "torch.bfloat16"},
            1,
            None if dtype == "torch.bfloat16" else "hybrid_zero_optimizer.grad_accumulation_dtype",
        )
        for dtype in ("torch.bfloat16", "torch.float16", "torch.float32", "torch.tf32", "torch.float64")
    ),
    ({"model.dtype": "torch.float32", "adam.moments_dtype": "torch.bfloat16"}, 1, None),
    ({"model.dtype": "torch.float64"}, 1, None),
    ({"model.dtype": "torch.float64", "adam.moments_dtype": "torch.bfloat16"}, 1, "adam.moments_dtype"),
    ({"model.dtype": "torch.float64", "reduce_comm_dtype": "torch.float32"}, 1, "reduce_comm_dtype"),
    (
        {"model.dtype": "torch.float64", "hybrid_zero_optimizer.offload_optimizer": True},
        1,
        "hybrid_zero_optimizer.offload_optimizer",
    ),
    ({"grad_scaler.fp16.initial_scale": 2.0**30}, 1, "grad_scaler.fp16.initial_scale"),
    (
        {"ckpt.load_ckpt_info": dict(path="x", content=("all",), ckpt_type="hf")},
        1,
        "ckpt.load_ckpt_info.content",
    ),
    ({"ckpt.load_ckpt_info": dict(path="x", content=("all",))}, 1, None),
    ({"cpu_offloading.num_layers": 3}, 1, "cpu_offloading.num_layers"),
    ({"cpu_offloading.num_layers": 3, "cpu_offloading.enable": True}, 1, None),
    # Packing: InternEvo's keys, the key that names all modes, and the document mask.
    ({"data.packing": "best_fit"}, 1, None),
    ({"data.packing": "best_fit", "data.pack_sample_into_one": False, "data.use_packed_dataset": True}, 1, None),
    ({"data.packing": "best_fit", "data.pack_sample_into_one": True}, 1, "data.packing"),
    ({"data.packing": "best_fit", "data.use_packed_dataset": False}, 1, "data.packing"),
    ({"data.packing": "unpacked", "data.use_packed_dataset": True}, 1, "data.packing"),
    ({"data.packing": "pack_sample_into_one", "data.pack_sample_into_one": False}, 1, "data.packing"),
    ({"data.packing": "pack_sample_into_one"}, 1, None),
    ({"data.packing": "pack_sample_into_one", "data.document_mask": True}, 1, "data.document_mask"),
    ({"data.packing": "unpacked", "data.document_mask": False}, 1, "data.document_mask"),
    ({"data.use_packed_dataset": False, "data.document_mask": False}, 1, "data.document_mask"),
    ({"data.pack_sample_into_one": True, "data.document_mask": True}, 1, "data.document_mask"),
    ({"data.packing": "best_fit", "data.document_mask": False}, 1, None),
    ({"data.document_mask": False}, 1, None),
    ({"data.fim": FIM, "data.train_folder": "x"}, 1, None),
    ({"data.fim": FIM}, 1, "data.fim"),
    ({"data.fim": {**FIM, "prefix": 2}, "data.train_folder": "x"}, 1, "data.fim.prefix"),
    ({"data.fim": {**FIM, "suffix": 64}, "data.train_folder": "x"}, 1, "data.fim.suffix"),
    ({"data.fim": {**FIM, "middle": "<mid>"}, "data.train_folder": "x"}, 1, "data.fim.middle"),
    ({"data.fim": {**FIM, "middle": "<mid>"}, "data.train_folder": "x", "data.tokenizer_path": "y"}, 1, None),
    ({"data.fim": {**FIM, "eos": "tokenizer"}, "data.train_folder": "x"}, 1, "data.fim.eos"),
    ({"data.type": "mocked"}, 1, "data.type"),
    # Exactly on the border is good.
    ({"lr_scheduler.eta_min": 1e-4, "adam.lr": 1e-4}, 1, None),
    ({"lr_scheduler.type": "wsd", "lr_scheduler.decay_ratio": 0.5, "lr_scheduler.warmup_ratio": 0.5}, 1, None),
    ({"grad_scaler.fp16.initial_scale": 4.0, "grad_scaler.max_scale": 4.0, "grad_scaler.fp16.min_scale": 4.0}, 1, None),
    ({"data.rampup_batch_size": "8 1 1"}, 1, None),
    ({**MOE, "parallel.zero1.size": 0, "parallel.expert.size": 0}, 4, None),
    (
        {
            TWO + "enable": True,
            "parallel.tensor.mode": "isp",
            TWO + "context_size": 4,
            TWO + "window_size": 2,
            TWO + "device_placement_strategy.interleaved": True,
            "parallel.tensor.size": 4,
            "data.use_packed_dataset": False,
        },
        4,
        None,
    ),
    # Experts are dealt to the ranks of a stage, whatever other axes these are on.
    ({**MOE, "parallel.expert.size": 4, "parallel.tensor.mode": "isp", "parallel.tensor.size": 2}, 4, None),
    ({**MOE, "parallel.expert.size": 4, "parallel.tensor.size": 2}, 4, None),
    ({**MOE, "parallel.expert.size": 4, "parallel.pipeline.size": 2}, 4, "parallel.expert.size"),
]


@pytest.mark.parametrize("changes, world_size, key", CASES)
def test_rule(changes, world_size, key):
    found = list(find_problems(small_config(changes), world_size))
    assert [mistake.keys[0] for mistake in found] == ([] if key is None else [key]), [m.text for m in found]
    known = {path for path, _ in walk_schema(Config)}
    for mistake in found:
        assert set(mistake.keys) <= known
        assert mistake.text.startswith(mistake.keys[0]), "a mistake names the key to mend first"
        assert ";" in mistake.text or any(word in mistake.text for word in ("must", "need", "expected", "give", "not"))


def test_the_divisors_are_offered():
    (mistake,) = find_problems(small_config({"parallel.zero1.size": 5}), 12)
    assert mistake.text.endswith("use -1 (all of them) or one of 1, 2, 3, 4, 6, 12")


@pytest.mark.parametrize(
    "changes, world_size, data, weights",
    [
        ({}, 8, 8, 8),
        ({"parallel.tensor.size": 2, "parallel.pipeline.size": 2}, 8, 2, 2),
        ({"parallel.tensor.size": 2, "parallel.tensor.mode": "isp", "parallel.weight.size": 4}, 16, 8, 4),
        ({"parallel.tensor.size": 3}, 8, None, None),
    ],
)
def test_ranks(changes, world_size, data, weights):
    config = small_config(changes)
    assert (data_ranks(config, world_size), weight_data_ranks(config, world_size)) == (data, weights)


@pytest.mark.parametrize(
    "changes, packing, document_mask, use_packed_dataset, pack_sample_into_one",
    [
        ({}, "cut", True, True, False),
        ({"document_mask": False}, "cut", False, True, False),
        ({"pack_sample_into_one": True}, "pack_sample_into_one", False, True, True),
        ({"packing": "pack_sample_into_one"}, "pack_sample_into_one", False, True, True),
        ({"use_packed_dataset": False}, "unpacked", True, False, False),
        ({"use_packed_dataset": False, "pack_sample_into_one": True}, "unpacked", True, False, True),
        ({"packing": "unpacked"}, "unpacked", True, False, False),
        ({"packing": "best_fit"}, "best_fit", True, True, False),
    ],
)
def test_packing_and_the_keys_of_internevo(changes, packing, document_mask, use_packed_dataset, pack_sample_into_one):
    config = small_config({f"data.{name}": value for name, value in changes.items()})
    for data in (config.data, Config.model_validate(config.model_dump()).data):
        assert (data.packing, data.document_mask) == (packing, document_mask)
        assert (data.use_packed_dataset, data.pack_sample_into_one) == (use_packed_dataset, pack_sample_into_one)
    assert not list(find_problems(Config.model_validate(config.model_dump()), 1))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"train_folder": "s3://b/x", "cache_bytes": 10, "cache_folder": "/c", "shuffle_files": 2}, None),
        ({"train_folder": "/x", "valid_folder": "s3://b/x", "cache_bytes": 10}, None),
        ({"blend": [{"path": "s3://b/x", "weight": 1.0}], "cache_bytes": 10, "shuffle_files": 2}, None),
        ({"blend": [{"path": "s9://b/x", "weight": 1.0}]}, r"data\.blend\[0\]\.path = 's9://b/x': .* unknown prefix"),
        ({"train_folder": "/x", "cache_bytes": 10}, "data.cache_bytes = 10 is for data in an object store"),
        ({"train_folder": "/x", "cache_folder": "/c"}, "data.cache_folder = '/c' is for data in an object store"),
        (
            {"train_folder": "s3://b/x", "cache_folder": "s3://b/c"},
            "data.cache_folder = 's3://b/c': give a folder on a",
        ),
        ({"train_folder": "s33://b/x"}, "data.train_folder = 's33://b/x': .* unknown prefix"),
        ({"valid_folder": "oss2:ali://b/x"}, "data.valid_folder = 'oss2:ali://b/x': .* has no endpoint"),
        ({"shuffle_files": 2}, "data.train_folder = None trains on random tokens"),
    ],
)
def test_data_in_object_stores(changes, text):
    config = small_config({f"data.{name}": value for name, value in changes.items()})
    problems = [problem.text for problem in find_problems(config, 1)]
    assert not problems if text is None else len(problems) == 1 and re.search(text, problems[0]), problems
