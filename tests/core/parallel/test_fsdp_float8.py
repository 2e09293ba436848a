"""FSDP's gathers in float8: half the bytes, and not a bit of difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import global_batch, tiny_config, tiny_engine
from helpers.traffic import Traffic
from torch import Tensor, nn

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import apply_fsdp, local_tensor, reshard
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.model.ops.float8.linear import float8_linear
from internlm.model.ops.float8.scaled_gemm import FORWARD_FORMAT, amax_of, quantize, scale_of
from internlm.model.ops.float8.weight_tensor import Float8Weight
from internlm.model.registry import build_model

STEPS, MICRO_BATCHES = 3, 2
FLOAT8_LAYERS = range(1, 3)

LENGTHS = (7, 1, 12, 12)
"""32 tokens."""

PADDED_ELEMENTS = (128 + 64 + 3 * 96) * 64
"""Of a layer: wqkv [128, 64], wo [64, 64] and the three of the MLP [96, 64], whose rows 2 ranks divide."""


def train(in_float8: bool, changes: dict[str, Any], layout: ParallelLayout | None = None) -> dict[str, Any]:
    """Some steps: what they computed, and what they sent."""
    context = ParallelContext.create(layout or ParallelLayout(world_size=torch.distributed.get_world_size()))
    rank, world = context.index("data"), context.size("data")
    config = tiny_config(hidden_size=64, num_layers=4, intermediate_size=96, dtype="torch.bfloat16", **changes)
    with torch.device("meta"):
        model = build_model("INTERNLM2", config)
    parallelize(model, context, seed=7, options=ParallelOptions(float8_layers=FLOAT8_LAYERS))
    spread_out(model, context)
    apply_fsdp(model, context, float8_scales=parallel_of(model).weight_scales if in_float8 else None)
    engine = tiny_engine(context, model=model, clip_grad_norm=0.5, reduce_bucket_size=3000)
    # A rate that moves weights across powers of two: a scale of the step before would be wrong.
    with Traffic() as traffic:
        losses = [
            float(engine.train_step(global_batch(step, world * MICRO_BATCHES, rank, world, lengths=LENGTHS), 0.3).loss)
            for step in range(STEPS)
        ]
    reshard(model)
    weights = {name: local_tensor(parameter).clone() for name, parameter in model.named_parameters()}
    context.close()
    return {"losses": losses, "weights": weights, "bytes": dict(traffic.num_bytes)}


@torch.no_grad()
def spread_out(model: nn.Module, context: ParallelContext) -> None:
    """Numbers of many sizes in each weight, smaller ones on later ranks: a scale of less than the whole rounds them
    otherwise."""
    for name, parameter in model.named_parameters():
        if name.startswith("layers.") and parameter.dim() == 2:
            rows, columns = (torch.arange(size) for size in parameter.shape)
            smaller = 6 if name.endswith("kv_weight") else 6 * context.index("tensor")
            sizes = columns % 16 + (8 * rows // len(rows)).unsqueeze(-1) + smaller
            parameter.mul_(torch.exp2(-sizes.float()))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("changes", [{}, {"checkpoint": 1.0, "qkv_bias": True}], ids=["plain", "checkpointed, bias"])
def test_fsdp_gathers_half_the_bytes_and_changes_no_bit(world: int, changes: dict[str, Any], ranks: Any) -> None:
    for whole, float8 in zip(
        ranks(world).run(train, False, changes), ranks(world).run(train, True, changes), strict=True
    ):
        assert float8["losses"] == whole["losses"]
        assert all(torch.equal(float8["weights"][name], weight) for name, weight in whole["weights"].items())
        saved = whole["bytes"]["all_gather", world] - float8["bytes"]["all_gather", world]
        gathered = STEPS * MICRO_BATCHES * 2 * len(FLOAT8_LAYERS) * PADDED_ELEMENTS
        # Three ranks pad the 64 rows of wo and the 128 of wqkv.
        assert saved == gathered if world == 2 else gathered < saved < 1.1 * gathered
        # The maxima of all five weights of all layers, in fp32, once a step.
        extra = STEPS * len(FLOAT8_LAYERS) * 5 * 4
        assert float8["bytes"]["all_reduce", world] - whole["bytes"]["all_reduce", world] == extra


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_kv_attention_heads": 1, "checkpoint": 1.0, "qkv_bias": True}],
    ids=["plain", "kv copies, checkpointed, bias"],
)
@pytest.mark.parametrize("mode", ["mtp", "msp", "fsp"])
def test_so_it_does_beside_tensor_ranks(mode: Any, changes: dict[str, Any], ranks: Any) -> None:
    """A scale is that of the whole weight: over tensor ranks, and over queries and key-values that are held apart."""
    has_copies = "num_kv_attention_heads" in changes
    layout = ParallelLayout(world_size=4, tensor=2, mode=mode, kv_replicas=2 if has_copies else 1)
    for whole, float8 in zip(
        ranks(4).run(train, False, changes, layout), ranks(4).run(train, True, changes, layout), strict=True
    ):
        assert float8["losses"] == whole["losses"]
        assert all(torch.equal(float8["weights"][name], weight) for name, weight in whole["weights"].items())
        # A rank has half the rows or columns of a layer's weights; of one key-value head it has the whole [32, 64].
        elements = PADDED_ELEMENTS // 2
        if has_copies:
            elements += (32 + 32 - 64) * 64
        gathers = STEPS * MICRO_BATCHES * 2 * len(FLOAT8_LAYERS)
        assert whole["bytes"]["all_gather", 2] - float8["bytes"]["all_gather", 2] == gathers * elements
        # The maxima of all five weights of all layers once a step, over either group of two, instead of in each forward
        # pass, over one.
        passes = MICRO_BATCHES * (2 if "checkpoint" in changes else 1)
        extra = (2 - passes) * STEPS * 5 * len(FLOAT8_LAYERS) * 4
        assert float8["bytes"]["all_reduce", 2] - whole["bytes"]["all_reduce", 2] == extra


def weight_pair() -> tuple[Tensor, Float8Weight]:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    values, scale = quantize(weight, scale_of(amax_of(weight), FORWARD_FORMAT), FORWARD_FORMAT)
    return weight, Float8Weight(values, scale, torch.bfloat16)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gathered_weight_is_multiplied_as_it_is(compiled: bool) -> None:
    function = torch.compile(float8_linear, fullgraph=True, backend="aot_eager") if compiled else float8_linear
    x = torch.randn(16, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    results = []
    for weight in weight_pair():
        leaves = x.clone().requires_grad_(), torch.nn.Parameter(weight)
        out = function(*leaves)
        out.square().sum().backward()
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for plain, gathered in zip(*results, strict=True):
        assert gathered is not None and not isinstance(gathered, Float8Weight)
        assert torch.equal(plain, gathered)


def test_a_gathered_weight_can_be_read() -> None:
    weight, gathered = weight_pair()
    # Half a step of e4m3, and a half of the smallest number's.
    bound = weight.abs().float() * 2.0**-4 + gathered.scale * 2.0**-10
    assert ((gathered.float() - weight.float()).abs() <= bound).all()
    assert isinstance(gathered.detach(), Float8Weight)
    assert not isinstance(gathered[:4], Float8Weight) and torch.equal(gathered[:4], (gathered * 1)[:4])
    assert repr(gathered) == "Float8Weight([32, 48], torch.bfloat16)"
