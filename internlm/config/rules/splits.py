"""Rules on what the ranks of a tensor group share: whole heads, equal parts of the MLP and of every row of tokens.

The vocabulary needs no rule: what is missing to equal parts is filled up inside the shards. Nor does an embedding that
is split over hidden: where that has no equal parts, the vocabulary is split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config

SIZE = "parallel.tensor.size"


def heads(config: Config, world_size: int) -> Iterator[Problem]:
    """A rank computes whole query heads (isp: after the exchange of sequence for heads), and whole key-value heads or
    copies of one."""
    model, size = config.model, config.parallel.tensor.size
    num_heads, num_kv_heads = model.num_attention_heads, model.num_kv_heads
    fitting = [n for n in _divisors(num_heads) if num_kv_heads % n == 0 or n % num_kv_heads == 0]
    fix = f"use a tensor size of {', '.join(map(str, fitting))}"
    if num_heads % size:
        yield Problem(
            ("model.num_attention_heads", SIZE),
            f"model.num_attention_heads = {num_heads} is not divisible by {SIZE} = {size}: each rank computes whole "
            f"heads; {fix}",
        )
    elif size not in fitting:
        yield Problem(
            ("model.num_kv_attention_heads", SIZE),
            f"model.num_kv_attention_heads = {num_kv_heads} and {SIZE} = {size}: one must divide the other, as each "
            f"rank holds whole key-value heads or a copy of one; {fix}",
        )


def feed_forward(config: Config, world_size: int) -> Iterator[Problem]:
    """The modes that split weights over the tensor group give each rank as much of the MLP."""
    model, tensor = config.model, config.parallel.tensor
    if tensor.mode == "isp" or model.ffn_size % tensor.size == 0:
        return
    fix = f"set model.intermediate_size = {_next_multiple(model.ffn_size, tensor.size)}"
    not_divisible = f"is not divisible by {SIZE} = {tensor.size}; {fix}"
    if model.intermediate_size is not None:
        yield Problem(("model.intermediate_size", SIZE), f"model.intermediate_size = {model.ffn_size} {not_divisible}")
    else:
        yield Problem(
            ("model.mlp_ratio", "model.multiple_of", SIZE),
            f"model.mlp_ratio = {model.mlp_ratio} makes the MLP {model.ffn_size} wide, which {not_divisible}",
        )


def sequence(config: Config, world_size: int) -> Iterator[Problem]:
    """The modes that split activations give each rank as many tokens of a row: of training, evaluation and dummy data
    alike, as all their rows have the same length."""
    data, tensor = config.data, config.parallel.tensor
    rows = data.micro_bsz if data.use_packed_dataset else 1
    if tensor.mode == "mtp" or rows * data.seq_len % tensor.size == 0:
        return
    length = f"data.seq_len = {data.seq_len}"
    if data.use_packed_dataset:
        length += f" times data.micro_bsz = {data.micro_bsz}"
    fitting = _next_multiple(data.seq_len, tensor.size // math.gcd(rows, tensor.size))
    yield Problem(
        ("data.seq_len", "data.micro_bsz", SIZE),
        f"{length} is not divisible by {SIZE} = {tensor.size}, over which the mode {tensor.mode!r} splits a row; "
        f"set data.seq_len = {fitting}",
    )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
