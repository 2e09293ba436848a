"""InternEvo's published configs: the keys and values of each, in a form of our own.

`text(keys)` is a config file. What all of them have is `COMMON`; a config adds and takes away single keys, by dotted
path.
"""

from __future__ import annotations

from typing import Any

_ABSENT = object()
_PLACEHOLDER = "local:llm_ckpts/xxxx"

_MODEL = {
    "checkpoint": False,
    "num_chunks": 1,
    "embed_split_hidden": True,
    "embed_grad_scale": 1,
    "parallel_output": True,
    "apply_post_layer_norm": False,
    "dtype": "torch.bfloat16",
    "norm_type": "rmsnorm",
    "layer_norm_epsilon": 1e-5,
    "use_flash_attn": True,
}

COMMON: dict[str, Any] = {
    "DO_ALERT": False,
    "ckpt": {
        "enable_save_ckpt": False,
        "save_ckpt_folder": "local:llm_ckpts",
        "auto_resume": False,
        "checkpoint_every": 50,
        "async_upload": True,
        "async_upload_tmp_folder": "/dev/shm/internlm_tmp_ckpt/",
        "oss_snapshot_freq": 25,
    },
    "data": {
        "seq_len": 2048,
        "micro_num": 4,
        "micro_bsz": 1,
        "valid_micro_num": 4,
        "valid_every": 0,
        "pack_sample_into_one": False,
        "total_steps": 20,
        "skip_batches": "",
        "rampup_batch_size": "",
        "min_length": 50,
        "train_folder": None,
        "valid_folder": None,
        "empty_cache_and_diag_interval": 200,
        "diag_outlier_ratio": 1.1,
    },
    "grad_scaler": {
        "fp16": {"initial_scale": 2**16, "min_scale": 1, "growth_interval": 1000},
        "growth_factor": 2,
        "backoff_factor": 0.5,
        "max_scale": 2**24,
        "hysteresis": 2,
    },
    "hybrid_zero_optimizer": {
        "overlap_sync_grad": True,
        "overlap_sync_param": False,
        "reduce_bucket_size": 512 * 1024 * 1024,
        "clip_grad_norm": 1.0,
    },
    "loss": {"label_smoothing": 0},
    "adam": {
        "lr": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_beta2_c": 0,
        "adam_eps": 1e-8,
        "weight_decay": 0.01,
    },
    "lr_scheduler": {"total_steps": 20, "init_steps": 0, "warmup_ratio": 0.01, "eta_min": 1e-5, "last_epoch": -1},
    "beta2_scheduler": {"init_beta2": 0.95, "c": 0, "cur_iter": -1},
    "use_fp32_norm": False,
    "cudnn_deterministic": False,
    "cudnn_benchmark": False,
    "model": _MODEL,
    "parallel": {
        "zero1": {"size": -1},
        "tensor": {"size": 1, "mode": "mtp"},
        "pipeline": {"size": 1, "interleaved_overlap": True},
        "weight": {"size": 1, "overlap": True},
    },
    "monitor": {
        "alert": {
            "enable_feishu_alert": False,
            "feishu_alert_address": None,
            "light_monitor_address": None,
            "alert_file_path": "llm_alter/job_alert.log",
        },
        "tensorboard": {"queue_max_length": 10},
    },
}

_GENERATION = {
    "ckpt_folder": "/path/to/saved/ckpt",
    "output_folder": "/path/to/save/generation",
    "batch_size": 1,
    "eos_id": [2, 0],
    "bos_id": 1,
    "max_length": 100,
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1,
    "length_penalty": 1.0,
}
_WEIGHTS = {"path": _PLACEHOLDER, "content": ("model",), "ckpt_type": "internevo"}
_RESUMED = {
    "ckpt.auto_resume": True,
    "ckpt.load_ckpt_folder": "local:llm_ckpts/",
    "ckpt.load_ckpt_info": _WEIGHTS,
}
_2D = {
    "enable": False,
    "head_size": 2,
    "context_size": 4,
    "window_size": 1,
    "device_placement_strategy": {"head_first": True, "interleaved": False},
}


def _size(vocab: int, hidden: int, heads: int, layers: int, mlp_ratio: float, kv_heads: int | None = None) -> dict:
    keys = {
        "model.vocab_size": vocab,
        "model.hidden_size": hidden,
        "model.num_attention_heads": heads,
        "model.num_layers": layers,
        "model.mlp_ratio": mlp_ratio,
    }
    return keys | ({} if kv_heads is None else {"model.num_kv_attention_heads": kv_heads})


def _from_hf(folder: str) -> dict:
    return {
        "ckpt.enable_internevo2hf_ckpt": False,
        "ckpt.save_ckpt_folder": f"local:{folder}",
        "ckpt.load_ckpt_info": {"path": f"local:{folder}/xxxx", "content": ("model",), "ckpt_type": "hf"},
        "model.qk_interleaved": False,
        "generation": _GENERATION,
    }


def _weight(size: int, **more: Any) -> dict:
    return {"parallel.weight": {"size": size, "overlap": True, **more}}


_7B_SFT = {
    **_size(103168, 4096, 32, 32, 8 / 3),
    **_RESUMED,
    **_weight(1, memory_pool=True),
    "data.micro_bsz": 2,
    "data.valid_every": 50,
}
_20B = {
    **_size(92544, 6144, 48, 48, 8 / 3, 8),
    "model_type": "INTERNLM2",
    "model.no_bias": True,
    "data.total_steps": 50,
}
_70B = {
    **_size(32000, 8192, 64, 80, 3.5, 8),
    "model_type": "LLAMA",
    "model.no_bias": True,
    "model.checkpoint": True,
    "ckpt.save_ckpt_folder": None,
    "ckpt.load_ckpt_info": None,
    "parallel.zero1.fsdp": False,
    "parallel.tensor": 4,
    "parallel.sequence_parallel": False,
    "parallel.weight": _ABSENT,
    "data.valid_every": 50,
    "data.empty_cache_and_diag_interval": 10,
    "monitor.alert.alert_file_path": _ABSENT,
    "monitor.tensorboard": _ABSENT,
}

# Name -> (ranks to start it on, what it has besides COMMON).
SUPPORTED: dict[str, tuple[int, dict[str, Any]]] = {
    "7B_sft": (8, _7B_SFT),
    "usage.md": (
        8,
        {
            **_7B_SFT,
            "ckpt.auto_resume": _ABSENT,
            "hybrid_zero_optimizer.overlap_sync_param": True,
            "model.dtype": "torch.float16",
            "use_fp32_norm": _ABSENT,
            "data.empty_cache_and_diag_interval": 10,
            "parallel": {"zero1": 8, "pipeline": {"size": 1, "interleaved_overlap": True}, "sequence_parallel": False},
            "monitor.tensorboard": _ABSENT,
        },
    ),
    "7B_isp_sft": (
        8,
        {
            **_size(103168, 4096, 32, 32, 8 / 3),
            **_RESUMED,
            **_weight(4, launch_allgather_before="wo", forward_overlap_per="layer"),
            "model_type": "INTERNLM2",
            "model.no_bias": True,
            "model.qk_interleaved": False,
            "data.micro_bsz": 2,
            "data.valid_every": 50,
            "loss.op_type": "flash_vocab_parallel",
            "parallel.tensor": {"size": 2, "mode": "isp"},
            "parallel.sequence_2D": _2D,
        },
    ),
    "7B_internlm2": (
        4,
        {
            **_size(92544, 4096, 32, 32, 3.5, 8),
            **_weight(2),
            "model_type": "INTERNLM2_PUBLIC",
            "model.no_bias": True,
            "model.qk_interleaved": False,
            "ckpt.universal_ckpt": {"enable": False, "aysnc_save": True, "broadcast_load": False},
            "parallel.tensor": {"size": 2, "mode": "isp"},
            "parallel.pipeline.mode": "1f1b",
            "generation": _GENERATION,
        },
    ),
    "7B_llama2": (
        8,
        {
            **_size(32000, 4096, 32, 32, 3.5, 8),
            **_weight(2, memory_pool=True),
            "model_type": "LLAMA2",
            "model.no_bias": True,
            "data.micro_num": 2,
            "parallel.zero1.size": 4,
            "parallel.tensor": {"size": 1, "mode": "isp"},
        },
    ),
    "7B_gemma": (
        8,
        {
            **_size(256000, 3072, 16, 28, 8, 16),
            **_from_hf("llm_ckpts_gemma"),
            "model_type": "GEMMA",
            "model.no_bias": True,
            "model.head_dim": 256,
            "model.max_position_embeddings": 8192,
            "model.add_unit_offset": True,
            "model.layer_norm_epsilon": 1e-6,
            "model.use_swiglu": False,
        },
    ),
    "7B_qwen2": (
        8,
        {
            **_size(152064, 3584, 28, 28, 5.25, 4),
            **_from_hf("llm_ckpts_qwen2"),
            "model_type": "QWEN2",
            "model.qkv_bias": True,
            "model.o_bias": False,
            "model.layer_norm_epsilon": 1e-6,
            "model.rope_base": 1000000,
            "model.use_sliding_window": False,
            "model.sliding_window": 32768,
            "model.max_window_layers": 28,
        },
    ),
    "7B_baichuan2": (
        8,
        {
            **_size(125696, 4096, 32, 32, 8 / 3),
            **_from_hf("llm_ckpts_baichuan2"),
            "model_type": "BAICHUAN2",
            "model.no_bias": True,
            "model.layer_norm_epsilon": 1e-6,
        },
    ),
    "8B_internlm3": (
        16,
        {
            **_size(128512, 4096, 32, 48, 2.5, 2),
            **_weight(16, launch_allgather_before="wo", forward_overlap_per="module"),
            "model_type": "INTERNLM3",
            "model.no_bias": True,
            "model.qk_interleaved": False,
            "model.rope_base": 50000000,
            "model.enable_qkv_fusion": False,
            "ckpt.save_ckpt_folder": None,
            "ckpt.load_ckpt_info": {"path": None, "content": ("model",), "ckpt_type": "hf"},
            "data.seq_len": 4096,
            "data.micro_num": 1,
            "data.micro_bsz": 2,
            "hybrid_zero_optimizer.overlap_sync_param": True,
            "loss.op_type": "py_vocab_parallel",
            "parallel.zero1.size": 1,
            "parallel.tensor": {"size": 1, "mode": "isp"},
            "parallel.sequence_2D": _2D,
        },
    ),
    "demo": (
        32,
        {
            **_20B,
            "enable_tb": True,
            "model.checkpoint": 1.0,
            "model.adapt_hf": True,
            "model.rope_base": 1000000,
            "model.use_flash_attn": _ABSENT,
            "ckpt.load_ckpt_info": {"path": None, "content": ("model",), "ckpt_type": "internevo"},
            "data.micro_bsz": 2,
            "data.valid_every": 50,
            "grad_profiling": {
                "grad_norm_profiling": False,
                "zero_grad_profiling": False,
                "layers": ["ScaleColumnParallelLinear"],
                "vocab_grad_norm_profiling": False,
                "interval_steps": 5,
            },
            "parallel": {
                "zero1": {"size": 16, "fsdp": False},
                "tensor": 2,
                "pipeline": {"size": 1, "interleaved_overlap": True},
                "sequence_parallel": True,
            },
        },
    ),
    "20B_internlm2": (
        128,
        {
            **_20B,
            **_weight(4, launch_allgather_before="wo", forward_overlap_per="layer"),
            "model.checkpoint": 0.5,
            "data.type": "tokenized",
            "data.seq_len": 16 * 1024,
            "data.train_folder": "/path/of/tokenized_data",
            "data.valid_folder": "/path/of/tokenized_data",
            "parallel.zero1.size": 8,
            "parallel.tensor": {"size": 1, "mode": "isp"},
            "parallel.pipeline": {"size": 4, "interleaved_overlap": True, "mode": "1f1b"},
            "selective_checkpoint": True,
            "selective_checkpoint_offload": False,
        },
    ),
    "20B_isp_sft": (
        32,
        {
            **_20B,
            **_RESUMED,
            **_weight(4, launch_allgather_before="wo", forward_overlap_per="layer"),
            "TASK_NAME": "a name of its users",
            "model.checkpoint": 1,
            "data.type": "tokenized",
            "data.seq_len": 64 * 1024,
            "data.train_folder": "/path/of/tokenized_data",
            "data.valid_folder": "/path/of/tokenized_data",
            "parallel.tensor": {"size": 32, "mode": "isp"},
            "parallel.sequence_2D": {**_2D, "head_size": 8},
            "selective_checkpoint": False,
            "selective_checkpoint_offload": False,
        },
    ),
    "70B_pretrain_llama2": (128, {**_70B, "parallel.pipeline.size": 2, "data.micro_num": 12, "data.micro_bsz": 4}),
    "70B_sft_llama2": (
        32,
        {
            **_70B,
            "parallel.pipeline.size": 8,
            "data.micro_num": 8,
            "data.train_folder": "dolly_tokenizer_llama/train",
            "data.valid_folder": "dolly_tokenizer_llama/valid",
            "grad_scaler.fp16.initial_scale": 2**14,
        },
    ),
    "qwen3_30B_A3B": (
        16,
        {
            **_size(151936, 2048, 32, 48, 768 / 2048, 4),
            "model_type": "QWEN3MOE",
            "model.head_dim": 128,
            "model.moe_type": "Dropless",
            "model.num_experts": 128,
            "model.num_shared_experts": 0,
            "model.top_k": 8,
            "model.moe_layer_kwargs": {"capacity_factor": None, "scoring_func": "softmax"},
            "loss.moe_loss_coeff": 0.001,
            "parallel.tensor": {"size": 1, "mode": "isp"},
            "parallel.weight.size": 8,
            "parallel.expert": {"size": 8, "no_tp": True},
            "parallel.expert_weight": {"size": 2, "overlap": True},
        },
    ),
    "demo_llava": (
        1,
        {
            **_size(32000, 4096, 32, 32, 3.5, 8),
            "model_type": "LLAVA",
            "data.is_multimodal": True,
            "data.image_size": 336,
            "data.patch_size": 14,
            "model.image_token_id": 200000,
            "model.vit_cfg": {
                "mm_vision_tower": "openai/a-tower-that-nobody-has",
                "mm_projector_type": "mlp2x_gelu",
                "mm_vision_select_layer": -2,
            },
            "model.vision_proj_cfg": {"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 1024},
        },
    ),
}

_7B_LLAMA2 = SUPPORTED["7B_llama2"][1]

# Name -> (ranks, what it has besides COMMON, what each refusal says first).
REFUSED: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "7B_llama2_zeropp": (
        32,
        {
            **_7B_LLAMA2,
            "data.micro_num": 4,
            "data.unit_schedule_size": 4,
            "model.num_chunks": 4,
            "parallel.zero1.size": -1,
            "parallel.pipeline": {"size": 4, "interleaved_overlap": True, "use_zeropp": True, "decouple_grad": True},
            "parallel.weight": {"size": 8, "overlap": True, "memory_pool": False},
        },
        ("parallel.pipeline.use_zeropp = True: the ZeroPP schedule",),
    ),
    "30B_llama2": (
        16,
        {
            **_size(32000, 6656, 52, 60, 2.6875, 52),
            "model_type": "LLAMA2",
            "model.no_bias": True,
            "model.mlp_layer_fusion": True,
            "model.enable_qkv_fusion": True,
            "int8_training": True,
            "int8_mode": "tile_block",
            "data.type": "streaming",
            "data.train_folder": "/path/of/texts",
            "data.tokenizer_path": "/path/of/a/tokenizer",
            "parallel.tensor": {"size": 4, "mode": "mtp"},
            "parallel.pipeline": {"size": 4, "interleaved_overlap": True},
        },
        ("int8_training = True: int8 training",),
    ),
    "34B_chameleon": (
        1,
        {
            **_size(65536, 8192, 64, 48, 2.6875, 8),
            "model_type": "CHAMELEON",
            "model.apply_post_layer_norm": True,
            "model.drop_rate": 0.0,
            "adam.clip_grad": 4.0,
            "data.type": "lumina_pickle",
            "data.data_yaml": "/path/of/data.yaml",
            "data.base_path": "/path/of/data/",
            "parallel.pipeline.zero_bubble": False,
        },
        (
            "data.type = 'lumina_pickle': this source",
            "model.apply_post_layer_norm = True: post-norm",
            "model_type = 'CHAMELEON': multimodal models",
        ),
    ),
}


def is_difference(notice: str) -> bool:
    """Whether a notice tells where a config means another run than InternEvo's."""
    return any(words in notice for words in ("with InternEvo", "InternEvo ignores", "differences from InternEvo"))


def text(keys: dict[str, Any]) -> str:
    """A config file of COMMON with these keys, of dotted paths."""
    tree = _copy(COMMON)
    for path, value in keys.items():
        *outer, name = path.split(".")
        place = tree
        for part in outer:
            place = place.setdefault(part, {})
        if value is _ABSENT:
            place.pop(name, None)
        else:
            place[name] = _copy(value)
    return "".join(f"{name} = {value!r}\n" for name, value in tree.items())


def _copy(value: Any) -> Any:
    return {name: _copy(item) for name, item in value.items()} if isinstance(value, dict) else value
