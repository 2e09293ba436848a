"""Tensor modes against one process: loss, and the gradient of every element of every weight."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.tiny import micro_batch, tiny_config
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model
from internlm.verify.compare import gradient_differences, rounding_of_gradients

LENGTHS = (7, 1, 12, 4)
"""24 tokens: divisible by 2 and 4; documents straddle the borders of the parts."""

MICRO_BATCHES = 4

TOLERANCE = rounding_of_gradients(torch.float32, tiny_config().num_layers, MICRO_BATCHES * sum(LENGTHS) * 4)
"""2.5e-6: a norm of query heads sums over 4 of them."""


def build(layout: ParallelLayout, options: ParallelOptions, model_type: str, changes: dict[str, Any]) -> nn.Module:
    context = ParallelContext.create(layout)
    with torch.device("meta"):
        model = build_model(model_type, tiny_config(**changes))
    return parallelize(model, context, seed=7, options=options)


def loss_and_gradients(
    layout: ParallelLayout, options: ParallelOptions, model_type: str, changes: dict[str, Any]
) -> tuple[float, dict[str, Tensor], int]:
    """Loss sum of one micro batch a data rank, the global gradient of every parameter, and correct tokens."""
    model = build(layout, options, model_type, changes)
    parallel = parallel_of(model)
    context = parallel.context
    loss_sum, correct = torch.zeros(()), torch.zeros(())
    # Every rank of a data group takes its own samples; the reference takes all.
    for index in range(context.index("data"), MICRO_BATCHES, context.size("data")):
        micro = micro_batch(index, LENGTHS)
        assert micro.lengths is not None
        hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))
        output = parallel.head_loss(
            model, hidden, micro.labels, micro.type_ids, partial(linear_cross_entropy, with_accuracy=True)
        )
        output.loss.loss_sum.backward()
        loss_sum += output.loss.loss_sum.detach()
        assert output.loss.correct is not None
        correct += output.loss.correct.sum()
    parallel.end_backward()
    for axis in parallel.token_axes:
        all_reduce(loss_sum, context.group(axis))
        all_reduce(correct, context.group(axis))
    gradients: dict[str, Tensor] = {}
    for parameter in model.parameters():
        spec = shard_spec_of(parameter)
        assert parameter.grad is not None, spec.name
        grad = parameter.grad.clone()
        for axis in (spec.data_axis, *spec.partial_over):
            all_reduce(grad, context.group(axis, spec.view))
        whole = gradients.setdefault(spec.name, torch.full(spec.global_shape, torch.nan))
        # Replicas must agree: boxes of all ranks are laid over each other.
        pieces: list[Any] = [None] * context.world_size
        mine = [(box, grad[box.local_slices()]) for box in spec.boxes]
        if context.world_size > 1:
            dist.all_gather_object(pieces, mine)
        else:
            pieces = [mine]
        for box, piece in (entry for rank in pieces for entry in rank):
            place = whole[box.global_slices()]
            assert torch.all(place.isnan() | (place == piece)), f"copies of {spec.name} differ"
            place.copy_(piece)
    context.close()
    return float(loss_sum), gradients, int(correct)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused_gqa": ("INTERNLM2", {}),
    "fused_mha_bias": ("INTERNLM", {"num_kv_attention_heads": 4}),
    "separate_gqa": ("LLAMA2", {"mlp_layer_fusion": False}),
    "separate_fused_ffn": ("LLAMA2", {"mlp_layer_fusion": True}),
    "qk_norm": ("INTERNLM2", {"qk_norm": True}),
    "all_biases": ("LLAMA2", {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
    "fused_one_kv_head": ("INTERNLM2", {"num_kv_attention_heads": 1, "qkv_bias": True, "qk_norm": True}),
    "separate_one_kv_head": ("LLAMA2", {"num_kv_attention_heads": 1, "qkv_bias": True}),
    "tied": ("GEMMA", {}),
    "norm_head": ("BAICHUAN2", {"num_kv_attention_heads": 4}),
    "checkpointed": ("INTERNLM2", {"checkpoint": 1.0}),
    "vocab_split": ("LLAMA2", {}),
    "fp32_residual": ("INTERNLM2", {"residual_in_fp32": True}),
}

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mtp2": ({"world_size": 2, "tensor": 2, "mode": "mtp"}, {}),
    "msp2": ({"world_size": 2, "tensor": 2, "mode": "msp"}, {}),
    "fsp2": ({"world_size": 2, "tensor": 2, "mode": "fsp"}, {}),
    "mtp4": ({"world_size": 4, "tensor": 4, "mode": "mtp"}, {}),
    "fsp4": ({"world_size": 4, "tensor": 4, "mode": "fsp"}, {}),
    "msp2dp2": ({"world_size": 4, "tensor": 2, "mode": "msp"}, {}),
    "isp1": ({"world_size": 1, "mode": "isp"}, {"postpone_weight_gradients": True}),
    "isp_sp2": ({"world_size": 2, "tensor": 2, "mode": "isp"}, {}),
    "isp_wp2": ({"world_size": 2, "weight": 2, "mode": "isp"}, {}),
    "isp_sp2wp4": (
        {"world_size": 4, "tensor": 2, "weight": 4, "mode": "isp"},
        {"weight_gathering": GatherPlan(overlap=True)},
    ),
    "isp_sp4wp2": (
        {"world_size": 4, "tensor": 4, "weight": 2, "mode": "isp"},
        {"weight_gathering": GatherPlan(overlap=True, ahead="module", memory_pool=True, release_gradients_early=False)},
    ),
    "isp_sp1wp4": (
        {"world_size": 4, "weight": 4, "mode": "isp"},
        {"weight_gathering": GatherPlan(overlap=True, memory_pool=True)},
    ),
}


def with_replicas(layout: dict[str, Any], changes: dict[str, Any]) -> ParallelLayout:
    num_kv_heads = changes.get("num_kv_attention_heads", 2)
    tensor = layout.get("tensor", 1)
    replicas = tensor // num_kv_heads if layout["mode"] != "isp" and tensor > num_kv_heads else 1
    return ParallelLayout(**layout, kv_replicas=replicas)


def on_rank(layout: str, model: str) -> tuple[float, dict[str, Tensor], int]:
    model_type, changes = MODELS[model]
    sizes, options = LAYOUTS[layout]
    return loss_and_gradients(
        with_replicas(sizes, changes),
        ParallelOptions(split_embedding_hidden=model != "vocab_split", **options),
        model_type,
        changes,
    )


def assert_equal(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to what rounding explains."""
    assert gradients.keys() == expected.keys()
    first, second = ({name: value.numpy() for name, value in found.items()} for found in (gradients, expected))
    differences = gradient_differences(first, second)
    assert {name: amount for name, amount in differences.items() if amount > TOLERANCE} == {}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mode_equals_one_process(layout: str, model: str, ranks: Any) -> None:
    model_type, changes = MODELS[model]
    loss, gradients, correct = loss_and_gradients(ParallelLayout(), ParallelOptions(), model_type, changes)
    for rank_loss, rank_gradients, rank_correct in ranks(LAYOUTS[layout][0]["world_size"]).run(on_rank, layout, model):
        assert rank_loss == pytest.approx(loss, rel=TOLERANCE)
        assert rank_correct == correct
        assert_equal(rank_gradients, gradients)


def dtensor_gradients(model: str) -> dict[str, Tensor]:
    """The same micro batches through torch's own tensor parallelism, as an oracle."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model_type, changes = MODELS[model]
    alone = ParallelContext(ParallelLayout(), 0, torch.device("cpu"))
    with torch.device("meta"):
        plain = build_model(model_type, tiny_config(**changes))
    parallelize(plain, alone, seed=7)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    column, row = ColwiseParallel(), RowwiseParallel()
    plan = {
        **{f"layers.*.attention.{name}": column for name in ("wq", "wk", "wv")},
        **{f"layers.*.feed_forward.{name}": column for name in ("w1", "w3")},
        "layers.*.attention.wo": row,
        "layers.*.feed_forward.w2": row,
    }
    parallelize_module(plain, mesh, plan)
    for index in range(MICRO_BATCHES):
        micro = micro_batch(index, LENGTHS)
        assert micro.lengths is not None
        hidden = plain(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))
        parallel_of(plain).head_loss(
            plain, hidden, micro.labels, micro.type_ids, linear_cross_entropy
        ).loss.loss_sum.backward()
    gradients = {}
    for name, parameter in plain.named_parameters():
        grad = parameter.grad
        assert grad is not None
        if isinstance(grad, DTensor):
            # Not full_tensor: torch keeps meshes by shape, also those whose groups another test has closed.
            (placement,) = grad.placements
            assert isinstance(placement, Shard)
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, grad.to_local())
            grad = torch.cat(parts, dim=placement.dim)
        gradients[name] = grad.clone()
    return gradients


@pytest.mark.parametrize("layout", ["mtp2", "msp2", "isp_sp2"])
def test_a_mode_equals_torch_tensor_parallel(layout: str, ranks: Any) -> None:
    ours = ranks(2).run(on_rank, layout, "separate_gqa")[0][1]
    theirs = ranks(2).run(dtensor_gradients, "separate_gqa")[0]
    assert_equal(ours, theirs)
