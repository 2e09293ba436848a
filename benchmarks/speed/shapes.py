"""The model shapes that can be measured, and the config file of a shape.

A measurement is configured by a file and `load_config`, like a user's training. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRECISIONS = ("fp32", "bf16", "fp8")
DOCUMENTS = ("one", "short", "mixed", "rows")
"""Lengths of documents. `one`: seq tokens; `short`: seq / 32 on average; `mixed`: uniform up to seq; `rows`: one
document of seq tokens per row, unpacked."""


@dataclass(frozen=True)
class Shape:
    """A model and the batch that it is measured with by default.

    Attributes:
        model_type: model family; "hf": Llama as transformers has it.
        hidden: hidden size.
        layers: number of layers.
        heads: query heads, key-value heads.
        ffn: intermediate size of the feed-forward, or of one expert.
        vocab: vocabulary size.
        seq: tokens per sequence.
        micro_bsz: sequences per micro-batch.
        micro_num: micro-batches per step.
        model: further keys of the `model` section.
        data: further keys of the `data` section.
    """

    model_type: str
    hidden: int
    layers: int
    heads: tuple[int, int]
    ffn: int
    vocab: int
    seq: int
    micro_bsz: int = 1
    micro_num: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)


def _experts(num_experts: int, top_k: int) -> dict[str, Any]:
    return {"num_experts": num_experts, "top_k": top_k, "moe_type": "Dropless"}


def _reader(*sizes: int, image: int, patch: int, tower: tuple[int, int, int, int], micro_bsz: int) -> Shape:
    """A LLaVA of Llama's sizes that reads one random picture in each document.

    Args:
        sizes: hidden, layers, heads, ffn, vocab and seq of the decoder.
        image, patch: sides in pixels.
        tower: hidden size, layers, heads and intermediate size of a CLIP tower.
        micro_bsz: sequences per micro-batch.
    """
    hidden, layers, heads, ffn, vocab, seq = sizes
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    pixels = {"image_size": image, "patch_size": patch}
    clip = {"model_type": "clip_vision_model", **dict(zip(names, tower, strict=True)), **pixels}
    model = {"image_token_id": vocab, "vit_cfg": {"config": clip, "mm_vision_select_layer": -2}}
    return Shape(
        *("LLAVA", hidden, layers, (heads, heads), ffn, vocab, seq),
        micro_bsz=micro_bsz,
        model={**model, "vision_proj_cfg": {"mm_projector_type": "mlp2x_gelu"}},
        data={"train_folder": None, "is_multimodal": True, **pixels},
    )


SHAPES: dict[str, Shape] = {
    "tiny": Shape("LLAMA2", 64, 2, (2, 2), 128, 256, 64, micro_bsz=2),
    "tiny-hf": Shape("hf", 64, 2, (2, 2), 128, 256, 64, micro_bsz=2),
    "tiny-llava": _reader(64, 2, 2, 128, 256, 64, image=16, patch=4, tower=(32, 2, 2, 64), micro_bsz=2),
    "demo": Shape("INTERNLM2", 256, 4, (8, 4), 704, 4096, 256, micro_bsz=2, micro_num=4),
    "cpu-384": Shape("LLAMA2", 384, 6, (6, 6), 1024, 8192, 512, micro_bsz=8),
    "cpu-768": Shape("LLAMA2", 768, 6, (12, 12), 2048, 8192, 512, micro_bsz=8),
    "cpu-1024": Shape("LLAMA2", 1024, 6, (16, 16), 2816, 8192, 512, micro_bsz=8),
    "cpu-moe": Shape("QWEN3MOE", 512, 4, (8, 4), 256, 8192, 512, micro_bsz=8, model=_experts(16, 4)),
    "hf-36m": Shape("hf", 384, 8, (6, 2), 1024, 32000, 512, micro_bsz=2),
    "hf-7b-layers": Shape("hf", 4096, 4, (32, 8), 14336, 92544, 4096, micro_bsz=2),
    "160m": Shape("LLAMA2", 768, 12, (12, 12), 2048, 50304, 2048, micro_bsz=16),
    "1b": Shape("LLAMA2", 2048, 22, (32, 4), 5632, 32000, 2048, micro_bsz=8),
    "1.5b": Shape("LLAMA2", 2048, 24, (16, 8), 6144, 65536, 4096, micro_bsz=4),
    "7b-layers": Shape("INTERNLM2", 4096, 4, (32, 8), 14336, 92544, 4096, micro_bsz=2, model={"rope_base": 1000000}),
    "7b": Shape("INTERNLM2", 4096, 32, (32, 8), 14336, 92544, 4096, model={"rope_base": 1000000}),
    "30b-a3b-layers": Shape(
        "QWEN3MOE", 2048, 4, (32, 4), 768, 151936, 4096, micro_bsz=2, model={"head_dim": 128, **_experts(128, 8)}
    ),
    "llava-7b-layers": _reader(
        *(4096, 4, 32, 11008, 32000, 2048), image=336, patch=14, tower=(1024, 24, 16, 4096), micro_bsz=4
    ),
    "8b": Shape("LLAMA2", 4096, 32, (32, 8), 14336, 128256, 4096, model={"rope_base": 500000}),
}


def keys_of(
    shape: Shape,
    precision: str,
    *,
    seq: int | None = None,
    micro_bsz: int | None = None,
    micro_num: int | None = None,
    layers: int | None = None,
    documents: str = "one",
    folder: str,
) -> dict[str, Any]:
    """The sections of a config.

    Args:
        shape: to be measured.
        precision: one of `PRECISIONS`.
        seq: replaces that of the shape, as do `micro_bsz`, `micro_num` and `layers`.
        documents: one of `DOCUMENTS`.
        folder: training data.
    """
    seq = seq or shape.seq
    dtype = "torch.float32" if precision == "fp32" else "torch.bfloat16"
    keys: dict[str, Any] = {
        "JOB_NAME": "throughput",
        "model_type": shape.model_type,
        **_model_keys(shape, layers or shape.layers, max(seq, 2048), dtype),
        "data": {
            "train_folder": folder,
            "seq_len": seq,
            "micro_bsz": micro_bsz or shape.micro_bsz,
            "micro_num": micro_num or shape.micro_num,
            "total_steps": 1_000_000,
            "use_packed_dataset": documents != "rows",
            # Worker processes would take cores from the measurement; a thread prefetches instead.
            "num_worker": 0,
            **shape.data,
        },
        "hybrid_zero_optimizer": {"clip_grad_norm": 1.0},
        "ckpt": {"enable_save_ckpt": False, "auto_resume": False},
    }
    if precision == "fp8":
        keys["float8"] = {"enable_float8_linear": True}
    return keys


def _model_keys(shape: Shape, layers: int, positions: int, dtype: str) -> dict[str, Any]:
    """The `model` section, or the `hf` section with what is left of it."""
    if shape.model_type == "hf":
        sizes = {
            "hidden_size": shape.hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": shape.heads[0],
            "num_key_value_heads": shape.heads[1],
            "intermediate_size": shape.ffn,
            "vocab_size": shape.vocab,
            "max_position_embeddings": positions,
        }
        hf = {
            "cfg": "transformers.models.llama.configuration_llama",
            "cfg_cls": "LlamaConfig",
            "cfg_extra_kwargs": sizes,
            "mod": "transformers.models.llama.modeling_llama",
            "mod_cls": "LlamaForCausalLM",
        }
        return {"hf": hf, "model": {"dtype": dtype}}
    model = {
        "hidden_size": shape.hidden,
        "num_layers": layers,
        "num_attention_heads": shape.heads[0],
        "num_kv_attention_heads": shape.heads[1],
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "max_position_embeddings": positions,
        "dtype": dtype,
        **shape.model,
    }
    return {"model": model}


def write_config(path: Path, keys: dict[str, Any]) -> None:
    """Write a config file with these keys."""
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in keys.items()), encoding="utf-8")
