"""Rules on what the ranks of a tensor group share: whole heads, equal parts of the MLP and of every row of tokens.

The vocabulary needs no rule: what is missing to equal parts is filled up inside the shards. Nor does an embedding that
is split over hidden: where that has no equal parts, the vocabulary is split.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from internlm.config.problem import Problem
from internlm.config.rules.layout_problems import layout_problems
from internlm.config.rules.ranks import expert_inner_ranks, expert_ranks
from internlm.config.schema import Config
from internlm.utils.layout_checks import check_heads, check_width, next_multiple

SIZE = "parallel.tensor.size"


def heads(config: Config, world_size: int) -> Iterator[Problem]:
    """A rank must compute whole query heads, and whole key-value heads or a copy of one.

    With isp, that is after the all-to-all from sequence to heads.
    """
    model = config.model
    parallel = config.parallel
    names = {
        "num_heads": "model.num_attention_heads",
        "num_kv_heads": "model.num_kv_attention_heads",
        "tensor": "parallel.sequence_2D.head_size" if parallel.sequence_2D.enable else SIZE,
    }
    check = partial(check_heads, model.num_attention_heads, model.num_kv_heads, parallel.tensor_ranks)
    yield from layout_problems(check, names)


def feed_forward(config: Config, world_size: int) -> Iterator[Problem]:
    """The modes that split weights over the tensor group give each rank as much of the MLP."""
    model, tensor = config.model, config.parallel.tensor
    if tensor.mode == "isp":
        return
    # For routed experts there is a rule of their own.
    for key, width in model.mlp_widths.items():
        name = f"model.{'intermediate_size' if key == 'mlp_ratio' else key}"
        for problem in layout_problems(partial(check_width, width, tensor.size), {"width": name, "tensor": SIZE}):
            if key != "mlp_ratio":
                yield problem
            else:
                keys = ("model.mlp_ratio", "model.multiple_of", *(other for other in problem.keys if other != name))
                yield Problem(keys, f"model.mlp_ratio = {model.mlp_ratio}: {problem.text}")


def sequence(config: Config, world_size: int) -> Iterator[Problem]:
    """Where activations are split, also for experts on several ranks, each rank gets as many tokens of a row.

    All rows of training, evaluation and dummy data have the same length. Context ranks fill a sample up instead.
    """
    data, tensor = config.data, config.parallel.tensor
    if config.parallel.context_ranks > 1:
        return
    rows = data.micro_bsz if data.use_packed_dataset else 1
    is_split = tensor.mode != "mtp" or max(expert_ranks(config, world_size), expert_inner_ranks(config)) > 1
    if not is_split or rows * data.seq_len % tensor.size == 0:
        return
    length = f"data.seq_len = {data.seq_len}"
    if data.use_packed_dataset:
        length += f" times data.micro_bsz = {data.micro_bsz}"
    splits = "splits" if tensor.mode != "mtp" else "and experts on several ranks split"
    fitting = next_multiple(data.seq_len, tensor.size // math.gcd(rows, tensor.size))
    yield Problem(
        ("data.seq_len", "data.micro_bsz", SIZE),
        f"{length} is not divisible by {SIZE} = {tensor.size}, over which the mode {tensor.mode!r} {splits} a row; "
        f"set data.seq_len = {fitting}",
    )
