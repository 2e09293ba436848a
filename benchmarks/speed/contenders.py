"""The compared training loops: this project's engine, and its alternatives.

Each trains a model of the same shape on the same tokens and calls `pacer.step_done` after every step. The peers are
written in the usual way and share no code with the project; most ignore document boundaries in a packed row.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed.corpus import ARRAY
from speed.pacer import Pacer
from speed.peer_batches import batches_of

from internlm.config.loader import load_config
from internlm.config.schema import Config
from internlm.utils.hf_classes import config_object, model_class

LEARNING_RATE = 3e-4


def device_of_this_machine() -> torch.device:
    """The device of all contenders."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def train_ours(config_file: Path, overrides: list[str], pacer: Pacer) -> None:
    """Train with the loader and engine of `internlm train`, built from a config file."""
    from internlm.core.context.parallel_context import ParallelContext
    from internlm.initialize.build import build_engine, build_layout, check_buildable, set_numerics
    from internlm.initialize.build_data import build_loader
    from internlm.initialize.build_hooks import build_flops
    from internlm.initialize.stages import build_chunks

    config = load_config(config_file, overrides).config
    check_buildable(config, 1)
    set_numerics(config)
    context = ParallelContext.create(build_layout(config, 1), pacer.device)
    loader = build_loader(config, context)
    chunks = build_chunks(config, context)
    engine = build_engine(config, context, chunks, loader.type_names)
    lengths: list[int] = []
    waited = 0.0
    while True:
        started = time.perf_counter()
        batch = next(loader)
        pacer.data_seconds += time.perf_counter() - started
        if pacer.is_warming_up:
            lengths += [length for micro in batch.segment_lengths for length in micro if length]
            pacer.wait()
            started = time.perf_counter()
        engine.train_step(batch, LEARNING_RATE)
        if pacer.is_warming_up:
            queued = time.perf_counter() - started
            pacer.wait()
            waited = time.perf_counter() - started
            is_cuda = pacer.device.type == "cuda"
            flops = build_flops(_with_seq(config, lengths), pacer.device, chunks[0])
            of_pictures = 0.0 if flops is None else flops.per_picture * batch.num_pictures / batch.num_tokens
            known = (
                {}
                if flops is None
                else {
                    "flops_full": flops.full + of_pictures,
                    "flops_causal": flops.causal + of_pictures,
                    "recomputed_flops": recomputed_flops(config, flops.full, flops.causal),
                    "peak_flops": flops.peak,
                }
            )
            pacer.facts = {
                **known,
                "tokens_per_step": batch.num_tokens,
                "host_share": queued / waited if is_cuda else None,
                "parameters": sum(parameter.numel() for parameter in chunks[0].parameters()),
            }
        pacer.step_done()


def _with_seq(config: Config, lengths: list[int]) -> Config:
    """The config with `seq_len` set to the mean document length per token, for the FLOPs of attention."""
    seq = round(sum(length**2 for length in lengths) / sum(lengths))
    return config.model_copy(update={"data": config.data.model_copy(update={"seq_len": max(seq, 1)})})


def recomputed_flops(config: Config, full: float, causal: float) -> float | None:
    """Causal FLOPs per token that `model.checkpoint` recomputes; None if recomputation is planned by layer.

    Args:
        config: of the run.
        full: FLOPs per token of training without recomputation, counting full attention.
        causal: the same, counting causal attention.
    """
    model = config.model
    if model.checkpoint_budget is not None:
        return None
    head = 6.0 * model.hidden_size * model.vocab_size
    layers, attention = (causal - head) / 3, (full - causal) / 3
    recomputed = {"nothing": layers, "attention": layers - attention, "matmuls": 0.0}[model.checkpoint_save_policy]
    return recomputed * model.num_recomputed / model.num_layers


def _hf_model(config: Config, attention: str) -> Any:
    """Llama, or for experts Qwen3-MoE with transformers' default implementation of experts, grouped GEMMs.

    With `model_type = "hf"`, the class of the config.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    model = config.model
    if model.hf_class is not None:
        kind = model_class(model.hf_class)
        return kind._from_config(config_object(model.hf_class), dtype=torch.float32, attn_implementation=attention)
    keys: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "max_position_embeddings": config.data.seq_len,
        "use_cache": False,
    }
    if model.num_experts > 1:
        experts = {
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.top_k,
            "moe_intermediate_size": model.ffn_size,
            "norm_topk_prob": model.moe_layer_kwargs.normalize_expert_weights,
            "output_router_logits": config.loss.moe_loss_coeff > 0,
            "router_aux_loss_coef": config.loss.moe_loss_coeff,
            "head_dim": model.head_dim or model.hidden_size // model.num_attention_heads,
        }
        hf_config: Any = Qwen3MoeConfig(**keys, **experts)
    else:
        hf_config = LlamaConfig(**keys, intermediate_size=model.ffn_size)
    built = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation=attention)
    if model.checkpoint == 1.0:
        built.gradient_checkpointing_enable()
    return built


def _plain(config: Config) -> Any:
    from plain_pytorch import Llama

    m = config.model
    if m.num_kv_heads != m.num_attention_heads:
        raise ValueError("plain_pytorch.py has no grouped-query attention: omit `plain` for this shape")
    return Llama(m.vocab_size, m.hidden_size, m.num_layers, m.num_attention_heads, m.ffn_size, config.data.seq_len)


def train_peer(name: str, config_file: Path, overrides: list[str], attention: str, pacer: Pacer) -> None:
    """Run one of the peers of `throughput.py`.

    Args:
        attention: transformers' `attn_implementation`.
    """
    config = load_config(config_file, overrides).config
    if name == "hf-trainer":
        _train_with_trainer(config_file, config, attention, pacer)
    is_hf = name.startswith("hf")
    is_compiled = name in ("hf", "hf-autocast", "plain-compile")
    autocast = config.model.torch_dtype != torch.float32 and (not is_hf or "autocast" in name)
    with pacer.device:
        model = _hf_model(config, attention) if is_hf else _plain(config)
    if not autocast:
        model = model.to(config.model.torch_dtype)
    model.train()
    network = torch.compile(model) if is_compiled else model

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if is_hf:
            return network(**batch).loss
        tokens = batch["input_ids"]
        logits = network(tokens)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    data = config.data
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    pacer.facts = {"tokens_per_step": data.packed_length * data.micro_num}
    batches = batches_of(
        config_file.parent, "padded" if "padded" in name else "packed" if "packed" in name else "rows", data.micro_bsz
    )
    while True:
        optimizer.zero_grad()
        for batch in itertools.islice(batches, data.micro_num):
            batch = {key: values.to(pacer.device) for key, values in batch.items()}
            with torch.autocast(pacer.device.type, torch.bfloat16, enabled=autocast):
                loss = loss_of(batch) / data.micro_num
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pacer.step_done()


def _train_with_trainer(config_file: Path, config: Config, attention: str, pacer: Pacer) -> None:
    """Train with transformers' Trainer in its usual form, with a callback for the timing."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            pacer.step_done()

    data = config.data
    tokens = torch.from_numpy(np.load(config_file.parent / ARRAY))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    model = _hf_model(config, attention)
    pacer.facts = {"tokens_per_step": data.packed_length * data.micro_num}
    arguments = TrainingArguments(
        output_dir=str(config_file.parent / "trainer"),
        per_device_train_batch_size=data.micro_bsz,
        gradient_accumulation_steps=data.micro_num,
        max_steps=1_000_000,
        learning_rate=LEARNING_RATE,
        bf16=config.model.torch_dtype != torch.float32,
        use_cpu=pacer.device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
