"""A tiny model whose layers differ: other heads in one block, a parameter of three dimensions in another."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from helpers.tiny import tiny_config
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.core.parallel.parallelize import parallelize
from internlm.model.initialization import Normal, set_initializer
from internlm.model.modules.attention import Attention
from internlm.model.registry import build_model


class Experts(nn.Module):
    """The sum of two linear layers, held as one tensor `[E, out, in]`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, hidden_size, hidden_size))
        set_initializer(self.weight, Normal(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,eoi->bso", x, self.weight)


def build_unlike_layers(layout: ParallelLayout, model_type: str, *, seed: int = 7) -> tuple[nn.Module, ParallelContext]:
    """The model and this rank's context."""
    context = ParallelContext.create(layout)
    with torch.device("meta"):
        model = build_model(model_type, tiny_config(qkv_bias=True))
        layers: Any = model.layers
        # Eight heads of one key-value head each instead of four with two; and the same width of a head.
        other = dataclasses.replace(model.architecture, num_heads=8, num_kv_heads=8)  # type: ignore[arg-type]
        layers["1"].attention = Attention(other, 1)
        layers["0"].feed_forward = Experts(32)
    options = ParallelOptions(weight_gathering=GatherPlan(overlap=layout.weight > 1))
    return parallelize(model, context, seed=seed, options=options), context
