"""What a layer keeps for backward in each mode: elements against the formulas of doc/parallelism.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import micro_batch, tiny_config

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.parallelize import parallelize
from internlm.model.ops.attention import Segments
from internlm.model.registry import build_model

TOKENS = 64
HIDDEN, WIDTH, HEADS, HEAD_DIM = 64, 96, 4, 16


def kept_by_a_model(layout: dict[str, Any], num_layers: int, kv_heads: int, family: str) -> int:
    """Elements of all storages that autograd keeps on this rank, parameters left out."""
    config = tiny_config(
        num_layers=num_layers,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_attention_heads=HEADS,
        num_kv_attention_heads=kv_heads,
    )
    with torch.device("meta"):
        model = build_model(family, config)
    context = ParallelContext.create(ParallelLayout(**layout))
    model = parallelize(model, context)
    micro = micro_batch(0, (TOKENS,))
    assert micro.lengths is not None
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(micro.input_ids, micro.position_ids, Segments.of(micro.lengths))
    context.close()
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())


def kept_by_a_layer(layout: dict[str, Any], kv_heads: int, family: str) -> float:
    """Elements a token that one layer more keeps: rotary tables and the ends of the model fall out."""
    three, two = (kept_by_a_model(layout, layers, kv_heads, family) for layers in (3, 2))
    return (three - two) / TOKENS


@pytest.mark.parametrize("family", ["INTERNLM2", "LLAMA2"])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("mode", [None, "mtp", "msp", "fsp", "isp"])
def test_a_layer_keeps_what_the_formulas_say(mode: str | None, kv_heads: int, family: str, ranks: Any) -> None:
    t = 1 if mode is None else 2
    inner = (3 * HEADS + 2 * max(kv_heads, t)) * HEAD_DIM + 3 * WIDTH
    # Beside what the formulas count: a number for each norm of a token, and one for each head of it in attention.
    residual, statistics = {
        None: (4 * HIDDEN, 2),
        "mtp": (4 * HIDDEN, 2),
        "msp": (2 * HIDDEN / t + 2 * HIDDEN, 2 / t),
        "fsp": (4 * HIDDEN / t, 2 / t),
        "isp": (4 * HIDDEN / t, 2 / t),
    }[mode]
    expected = residual + inner / t + statistics + HEADS / t
    if mode is None:
        assert kept_by_a_layer({}, kv_heads, family) == expected
        return
    layout = {"world_size": t, "tensor": t, "mode": mode}
    if kv_heads < t and mode != "isp":
        layout["kv_replicas"] = t // kv_heads
    assert ranks(t).run(kept_by_a_layer, layout, kv_heads, family) == [expected] * t
