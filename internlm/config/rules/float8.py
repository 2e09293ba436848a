"""Rules on float8: GEMMs in tiles of 16, a bfloat16 model, and dynamic scales.

Layouts are compared in float64, which is therefore accepted too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.rules.ranks import expert_inner_ranks
from internlm.config.schema import Config

ENABLE, SIZE = "float8.enable_float8_linear", "parallel.tensor.size"

MULTIPLE = 16
"""Tokens, and a layer's input and output features on a rank, must be multiples of this."""


def formats(config: Config, world_size: int) -> Iterator[Problem]:
    """Float8 needs dynamic scales, bfloat16, and a layer that uses it."""
    if not config.float8.enable_float8_linear:
        return
    for name in ("scaling_type_input", "scaling_type_weight", "scaling_type_grad_output"):
        if getattr(config.float8, name) != "dynamic":
            yield Problem(
                (f"float8.{name}",),
                f"float8.{name} = 'delayed': scales from earlier steps are not supported, as torchao has removed them; "
                "use 'dynamic', which computes each scale from its tensor",
            )
    if config.model.dtype not in ("torch.bfloat16", "torch.float64"):
        yield Problem(
            (ENABLE, "model.dtype"),
            f"{ENABLE} = True needs model.dtype = 'torch.bfloat16', which is {config.model.dtype!r}",
        )
    num_layers = config.model.num_layers
    if not config.float8.layers(num_layers):
        yield Problem(
            (ENABLE, "float8.first_and_last_layer", "model.num_layers"),
            f"{ENABLE} = True changes nothing: the first and the last layer stay in {config.model.dtype!r}, and "
            f"model.num_layers = {num_layers}; set float8.first_and_last_layer = True, or turn float8 off",
        )


def dimensions(config: Config, world_size: int) -> Iterator[Problem]:
    """Every GEMM of a layer consists of whole tiles on each rank."""
    if not config.float8.enable_float8_linear:
        return
    model, tensor = config.model, config.parallel.tensor
    of_weights = 1 if tensor.mode == "isp" else tensor.size
    if model.hidden_size % MULTIPLE:
        yield Problem(
            ("model.hidden_size", ENABLE),
            f"model.hidden_size = {model.hidden_size} {_must(MULTIPLE)}; set {_next(model.hidden_size, MULTIPLE)}",
        )
    head_dim = model.attention_head_dim
    numbers = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_kv_attention_heads": model.num_kv_heads,
    }
    if model.kv_lora_rank is not None:
        yield from _latent_dimensions(config, of_weights)
        numbers = {}
    for key, heads in numbers.items():
        width = max(1, heads // of_weights) * head_dim
        if width % MULTIPLE:
            yield Problem(
                (key, "model.head_dim", SIZE, ENABLE),
                f"{key} = {heads} heads of {head_dim} channels, split over {of_weights} tensor rank(s), are {width} "
                f"channels a rank, which {_must(MULTIPLE)}; set model.head_dim = {_next(head_dim, MULTIPLE)}, or "
                f"another {SIZE}",
            )
    for key, width in model.mlp_widths.items():
        yield from _width(config, key, width, "the MLP", of_weights)
    if model.num_experts > 1 and model.expert_size_key not in model.mlp_widths:
        of_experts = 1 if tensor.mode == "isp" else expert_inner_ranks(config)
        yield from _width(config, model.expert_size_key, model.expert_size, "an expert", of_experts)
    parallel = config.parallel
    of_tokens = parallel.context_ranks * (parallel.tensor_ranks if tensor.mode == "isp" else 1)
    tokens, multiple = config.data.packed_length, MULTIPLE * of_tokens
    if tokens % multiple:
        length = _next(config.data.seq_len, multiple // math.gcd(multiple, config.data.micro_bsz))
        yield Problem(
            ("data.seq_len", "data.micro_bsz", SIZE, ENABLE),
            f"data.seq_len = {config.data.seq_len} times data.micro_bsz = {config.data.micro_bsz} are {tokens} tokens "
            f"on {of_tokens} sequence rank(s), which {_must(multiple)}; set data.seq_len = {length}",
        )


def _width(config: Config, key: str, width: int, what: str, ranks: int) -> Iterator[Problem]:
    """The width of a feed-forward network on each rank is whole tiles."""
    multiple = MULTIPLE * ranks
    if width % multiple:
        exact = "intermediate_size" if key == "mlp_ratio" else key
        yield Problem(
            (f"model.{key}", SIZE, ENABLE),
            f"model.{key} = {getattr(config.model, key)} makes {what} {width} wide on {ranks} tensor rank(s), "
            f"which {_must(multiple)}; set model.{exact} = {_next(width, multiple)}",
        )


def _latent_dimensions(config: Config, of_weights: int) -> Iterator[Problem]:
    """Ranks of the projections, and the channels of all heads of a tensor rank, are whole tiles."""
    model = config.model
    heads = max(1, model.num_attention_heads // of_weights)
    plain, rotary, value = model.qk_nope_head_dim or 0, model.qk_rope_head_dim or 0, model.v_head_dim or 0
    for keys, width in (
        (("q_lora_rank",), model.q_lora_rank or 0),
        (("kv_lora_rank",), model.kv_lora_rank or 0),
        (("kv_lora_rank", "qk_rope_head_dim"), (model.kv_lora_rank or 0) + rotary),
        (("qk_nope_head_dim", "qk_rope_head_dim"), heads * (plain + rotary)),
        (("qk_nope_head_dim", "v_head_dim"), heads * (plain + value)),
        (("v_head_dim",), heads * value),
    ):
        if width % MULTIPLE:
            names = " and ".join(f"model.{key} = {getattr(model, key)}" for key in keys)
            yield Problem(
                (*(f"model.{key}" for key in keys), SIZE, ENABLE),
                f"{names}, with {heads} heads on each of {of_weights} tensor rank(s), make a projection {width} wide, "
                f"which {_must(MULTIPLE)}; change one of them",
            )


def _must(multiple: int) -> str:
    return f"must be a multiple of {multiple} for float8"


def _next(number: int, of: int) -> int:
    return -(-number // of) * of
