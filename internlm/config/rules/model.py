"""Rules on the shape and numerics of the model."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config


def interleaving_of_heads(config: Config, world_size: int) -> Iterator[Problem]:
    """`adapt_hf` must be the opposite of `qk_interleaved`."""
    model = config.model
    if model.adapt_hf is not None and model.adapt_hf == model.qk_interleaved:
        yield Problem(
            ("model.adapt_hf", "model.qk_interleaved"),
            f"model.adapt_hf = {model.adapt_hf} contradicts model.qk_interleaved = {model.qk_interleaved}; "
            "it is the opposite: leave adapt_hf out",
        )


def shape(config: Config, world_size: int) -> Iterator[Problem]:
    """Heads must divide the width, and windows, biases and position scaling must be consistent."""
    model = config.model
    heads, kv_heads = model.num_attention_heads, model.num_kv_attention_heads
    if model.head_dim is None and model.kv_lora_rank is None and model.hidden_size % heads:
        yield Problem(
            ("model.hidden_size", "model.num_attention_heads"),
            f"model.hidden_size = {model.hidden_size} is not divisible by model.num_attention_heads = {heads}; "
            "change one of them or give model.head_dim",
        )
    if kv_heads is not None and heads % kv_heads:
        yield Problem(
            ("model.num_kv_attention_heads", "model.num_attention_heads"),
            f"model.num_kv_attention_heads = {kv_heads} does not divide model.num_attention_heads = {heads}",
        )
    if model.use_sliding_window and model.sliding_window is None:
        yield Problem(
            ("model.sliding_window", "model.use_sliding_window"),
            "model.sliding_window = None: give its length in tokens, or set model.use_sliding_window = False",
        )
    if model.use_dynamic_ntk_rope and model.rope_scaling is not None:
        yield Problem(
            ("model.use_dynamic_ntk_rope", "model.rope_scaling"),
            "model.use_dynamic_ntk_rope = True and model.rope_scaling are two scalings of positions; keep one",
        )
    if model.no_bias:
        for name in ("qkv_bias", "o_bias", "mlp_bias"):
            if getattr(model, name):
                yield Problem(
                    (f"model.{name}", "model.no_bias"),
                    f"model.{name} = True contradicts no_bias = True; keep one",
                )


def attention_backend(config: Config, world_size: int) -> Iterator[Problem]:
    """A backend is of attention that has several, and flash-attn must not be both requested and ruled out."""
    model, parallel = config.model, config.parallel
    if parallel.context_ranks > 1 and model.attention_backend != "auto":
        key = "parallel.sequence_2D.context_size" if parallel.sequence_2D.enable else "parallel.context.size"
        yield Problem(
            ("model.attention_backend", key),
            f"model.attention_backend = {model.attention_backend!r} does not work with {key} = "
            f"{parallel.context_ranks}: attention between context ranks has an implementation of its own; leave the "
            "key out",
        )
    if config.model_type == "GPT_OSS" and model.attention_backend != "auto":
        yield Problem(
            ("model.attention_backend", "model_type"),
            f"model.attention_backend = {model.attention_backend!r}: attention sinks (model_type = 'GPT_OSS') have an "
            "implementation of their own; leave the key out",
        )
    if model.attention_backend.startswith("flash-attn") and not model.use_flash_attn:
        yield Problem(
            ("model.attention_backend", "model.use_flash_attn"),
            f"model.attention_backend = {model.attention_backend!r} contradicts model.use_flash_attn = False; "
            "leave one of them out",
        )


def recomputation(config: Config, world_size: int) -> Iterator[Problem]:
    """The keys of recomputation and of activation offload must not contradict each other."""
    model = config.model
    policy = f"model.checkpoint_save_policy = {model.checkpoint_save_policy!r}"
    if config.selective_checkpoint and model.checkpoint_save_policy != "attention":
        yield Problem(
            ("selective_checkpoint", "model.checkpoint_save_policy"),
            f"selective_checkpoint = True contradicts {policy}: it is the older spelling of 'attention'; keep one",
        )
    elif config.selective_checkpoint_offload and model.checkpoint_save_policy != "attention":
        yield Problem(
            ("selective_checkpoint_offload", "model.checkpoint_save_policy"),
            f"selective_checkpoint_offload = True moves attention's outputs, which {policy} does not save alone; set "
            "model.checkpoint_save_policy = 'attention'",
        )
    if config.selective_checkpoint_offload and model.compile:
        yield Problem(
            ("selective_checkpoint_offload", "model.compile"),
            "selective_checkpoint_offload = True does not work with model.compile = True: the saved tensors of a "
            "compiled layer belong to its graph; set one of them to False, or use cpu_offloading",
        )
    if model.checkpoint_budget is None:
        return
    budget = f"model.checkpoint_budget = {model.checkpoint_budget}"
    if model.checkpoint > 0 or model.checkpoint_save_policy != "nothing":
        yield Problem(
            ("model.checkpoint_budget", "model.checkpoint", "model.checkpoint_save_policy"),
            f"{budget} chooses what each layer recomputes, and so do model.checkpoint = {model.checkpoint} and {policy}"
            f"{' (selective_checkpoint)' if config.selective_checkpoint else ''}; use the budget or the others",
        )
    if config.cpu_offloading.enable:
        yield Problem(
            ("model.checkpoint_budget", "cpu_offloading.enable"),
            f"{budget} plans for activations that stay on the device, but cpu_offloading.enable = True moves some; use "
            "one of the two",
        )
