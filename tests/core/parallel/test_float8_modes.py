"""Float8 layers in every mode against one process.

The model is in float64. Products of float8 numbers are exact there, and so are their sums; what is left between layouts
is rounding to 1e-16, which moves no number across the border between two of float8 (a border is hit by one in 1e15). So
layouts agree to float64's rounding when every element has the same scale everywhere, and by no less than float8's 1e-2
when one has not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.tiny import micro_batch, tiny_config
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.communication.exchange import own_part
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.model.ops.attention import Segments
from internlm.model.registry import build_model

LENGTHS = (7, 1, 12, 12)
"""32 tokens."""

LAYERS, FLOAT8_LAYERS = 3, range(1, 3)
SIZES = {"hidden_size": 64, "num_layers": LAYERS, "intermediate_size": 96}
MICRO_BATCHES = 2

# Rounding of float64 in some 200 operations one after the other, and of sums of 64 terms: 1e-16 * sqrt(200 * 64).
# Norms, rotary angles and softmax are computed in fp32, but from the same fp32 numbers everywhere.
TOLERANCE = 1e-13


def build(
    layout: ParallelLayout, options: dict[str, Any], family: str = "INTERNLM2", **changes: Any
) -> tuple[nn.Module, ParallelContext]:
    context = ParallelContext.create(layout)
    with torch.device("meta"):
        model = build_model(family, tiny_config(**SIZES, **changes)).double()
    chosen = ParallelOptions(**{"float8_layers": FLOAT8_LAYERS, **options})
    return parallelize(model, context, seed=7, options=chosen), context


def run(model: nn.Module, context: ParallelContext) -> Tensor:
    """Forward and backward of one micro batch a data rank; the last one's hidden states on this rank."""
    parallel = parallel_of(model)
    hidden = torch.empty(0)
    for index in range(context.index("data"), MICRO_BATCHES, context.size("data")):
        micro = micro_batch(index, LENGTHS)
        assert micro.lengths is not None
        hidden = model(micro.input_ids, micro.position_ids, Segments.of(micro.lengths))
        weights = torch.randn(1, sum(LENGTHS), 64, generator=torch.Generator().manual_seed(index)).double()
        group = context.group("tensor") if hidden.shape[1] < sum(LENGTHS) else None
        (hidden * own_part(weights, group)).sum().backward()
    parallel.end_backward()
    return hidden.detach()


def whole_gradients(model: nn.Module, context: ParallelContext) -> dict[str, Tensor]:
    """The global gradient of every parameter but the head."""
    gradients: dict[str, Tensor] = {}
    for parameter in model.parameters():
        spec = shard_spec_of(parameter)
        if spec.name == "output.weight":
            continue
        assert parameter.grad is not None, spec.name
        grad = parameter.grad.clone()
        for axis in (spec.data_axis, *spec.partial_over):
            all_reduce(grad, context.group(axis, spec.view))
        whole = gradients.setdefault(spec.name, torch.full(spec.global_shape, torch.nan, dtype=torch.float64))
        pieces: list[Any] = [None] * context.world_size
        mine = [(box, grad[box.local_slices()]) for box in spec.boxes]
        if context.world_size > 1:
            dist.all_gather_object(pieces, mine)
        else:
            pieces = [mine]
        for box, piece in (entry for rank in pieces for entry in rank):
            whole[box.global_slices()] = piece
    return gradients


def on_rank(layout: ParallelLayout, options: dict[str, Any], family: str, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Whole gradients, and this rank's hidden states of the last micro batch as "hidden"."""
    model, context = build(layout, options, family, **changes)
    hidden = run(model, context)
    result = {**whole_gradients(model, context), "hidden": hidden}
    context.close()
    return result


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """By name the L2 norm of each difference relative to that of the wanted tensor."""
    assert found.keys() == wanted.keys()
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": ("INTERNLM2", {}),
    "separate, biases": ("LLAMA2", {"mlp_layer_fusion": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True}),
    "checkpointed": ("INTERNLM2", {"checkpoint": 1.0}),
}

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mtp2": ({"world_size": 2, "tensor": 2, "mode": "mtp"}, {}),
    "msp2": ({"world_size": 2, "tensor": 2, "mode": "msp"}, {}),
    "fsp2": ({"world_size": 2, "tensor": 2, "mode": "fsp"}, {}),
    "isp_sp2": ({"world_size": 2, "tensor": 2, "mode": "isp"}, {}),
    "isp_wp2": ({"world_size": 2, "weight": 2, "mode": "isp"}, {"weight_overlap": True, "memory_pool": True}),
    "isp_sp2wp2, whole gathers": ({"world_size": 2, "tensor": 2, "weight": 2, "mode": "isp"}, {"gather_float8": False}),
    "data2": ({"world_size": 2}, {}),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mode_equals_one_process(layout: str, model: str, ranks: Any) -> None:
    family, changes = MODELS[model]
    sizes, options = LAYOUTS[layout]
    options = {**options, "reduce_dtype": torch.float64}
    wanted = on_rank(ParallelLayout(), {}, family, changes)
    split = {"msp2", "fsp2", "isp_sp2", "isp_sp2wp2, whole gathers"}
    results = ranks(2).run(on_rank, ParallelLayout(**sizes), options, family, changes)
    for rank, result in enumerate(results):
        hidden = wanted["hidden"].chunk(2, dim=1)[rank] if layout in split else wanted["hidden"]
        # Each data rank's last micro batch is another one.
        expected = {**wanted, "hidden": hidden if "tensor" in sizes or rank == 1 else result["hidden"]}
        assert {n: d for n, d in worst(result, expected).items() if not d <= TOLERANCE} == {}


def test_float8_is_seen() -> None:
    """What the comparisons above compare is not the model without float8."""
    with_float8 = on_rank(ParallelLayout(), {}, "INTERNLM2", {})
    without = on_rank(ParallelLayout(), {"float8_layers": range(0)}, "INTERNLM2", {})
    differences = worst(with_float8, without)
    # e5m2 rounds by 2^-3 / sqrt(12) on average or so, e4m3 by half of that.
    assert all(1e-3 < amount < 0.3 for amount in differences.values())
