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
from helpers.pipelines import Run, together, train
from helpers.tiny import global_batch, micro_batch, tiny_config, tiny_engine
from helpers.traffic import Traffic
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.communication.exchange import own_part
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.parallel_linear import ParallelLinear
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.linear.weight_scales import WeightScales
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.model.modules.linear import Float8Linear
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.registry import build_model
from internlm.utils.errors import ConfigError

LENGTHS = (7, 1, 12, 12)
"""32 tokens."""

LAYERS, FLOAT8_LAYERS = 3, range(1, 3)
SIZES = {"hidden_size": 64, "num_layers": LAYERS, "intermediate_size": 96}
MICRO_BATCHES = 2
STEPS = 3

# Rounding of float64 in some 200 operations one after the other, and of sums of 64 terms: 1e-16 * sqrt(200 * 64).
# Norms, rotary angles and softmax are computed in fp32, but from the same fp32 numbers everywhere.
TOLERANCE = 1e-13


def build(
    layout: ParallelLayout, options: dict[str, Any], family: str = "INTERNLM2", **changes: Any
) -> tuple[nn.Module, ParallelContext]:
    context = ParallelContext.create(layout)
    with torch.device("meta"):
        model = build_model(family, tiny_config(**SIZES, **changes))
        # No config asks for float64.
        model = model if "dtype" in changes else model.double()
    chosen = ParallelOptions(**{"float8_layers": FLOAT8_LAYERS, **options})
    return parallelize(model, context, seed=7, options=chosen), context


def run(model: nn.Module, context: ParallelContext) -> Tensor:
    """Forward and backward of one micro batch a data rank; the last one's hidden states on this rank."""
    hidden = run_without_end(model, context)
    parallel_of(model).end_backward()
    return hidden


def run_without_end(model: nn.Module, context: ParallelContext) -> Tensor:
    """As `run`, with gradients that may be still to come."""
    hidden = torch.empty(0)
    for index in range(context.index("data"), MICRO_BATCHES, context.size("data")):
        micro = micro_batch(index, LENGTHS)
        assert micro.lengths is not None
        hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))
        weights = torch.randn(1, sum(LENGTHS), 64, generator=torch.Generator().manual_seed(index)).to(hidden)
        group = context.group("tensor") if hidden.shape[1] < sum(LENGTHS) else None
        (hidden * own_part(weights, group)).sum().backward()
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
    # The input is rounded again without being multiplied again.
    "checkpointed, products kept": ("INTERNLM2", {"checkpoint": 1.0, "checkpoint_save_policy": "matmuls"}),
}

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mtp2": ({"world_size": 2, "tensor": 2, "mode": "mtp"}, {}),
    "msp2": ({"world_size": 2, "tensor": 2, "mode": "msp"}, {}),
    "fsp2": ({"world_size": 2, "tensor": 2, "mode": "fsp"}, {}),
    "isp_sp2": ({"world_size": 2, "tensor": 2, "mode": "isp"}, {}),
    "isp_wp2": (
        {"world_size": 2, "weight": 2, "mode": "isp"},
        {"weight_gathering": GatherPlan(overlap=True, memory_pool=True)},
    ),
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


def outputs_next_to_an_outlier(sizes: dict[str, Any]) -> tuple[int, float]:
    """Index among the ranks of a sample, and the largest output of a projection; the others have small inputs."""
    model, context = build(ParallelLayout(**sizes), {})
    index = context.index("sample") if sizes["mode"] == "isp" else context.index("context")
    projection = model.get_submodule("layers.1.attention.wqkv")
    x = torch.full((1, 4, 64), 1.0 if index == 0 else 2.0**-20, dtype=torch.float64)
    largest = float(projection(x).abs().max())
    context.close()
    return index, largest


@pytest.mark.parametrize(
    "sizes",
    [
        {"world_size": 2, "context": 2, "mode": "mtp"},
        {"world_size": 4, "context": 2, "tensor": 2, "mode": "mtp"},
        {"world_size": 4, "context": 2, "tensor": 2, "mode": "isp"},
        {"world_size": 4, "context": 2, "tensor": 2, "mode": "isp", "head_first": False},
    ],
    ids=str,
)
def test_all_ranks_of_a_sample_have_one_scale(sizes: dict[str, Any], ranks: Any) -> None:
    """2^-20 is lost in e4m3 beside 1, and would not be with a scale of its own."""
    for index, largest in ranks(sizes["world_size"]).run(outputs_next_to_an_outlier, sizes):
        assert (largest > 0) == (index == 0)


def test_float8_is_seen() -> None:
    """What the comparisons above compare is not the model without float8."""
    with_float8 = on_rank(ParallelLayout(), {}, "INTERNLM2", {})
    without = on_rank(ParallelLayout(), {"float8_layers": range(0)}, "INTERNLM2", {})
    differences = worst(with_float8, without)
    # e5m2 rounds by 2^-3 / sqrt(12) on average or so, e4m3 by half of that.
    assert all(1e-3 < amount < 0.3 for amount in differences.values())


# -- gathers of weights in float8 -----------------------------------------------------------------------------------


def gathering(in_float8: bool, overlap: bool) -> dict[str, Any]:
    """Some steps of isp with weights split: what they computed, and the bytes they sent."""
    options = {"gather_float8": in_float8, "weight_gathering": GatherPlan(overlap=overlap, memory_pool=overlap)}
    model, context = build(ParallelLayout(world_size=2, weight=2, mode="isp"), options, dtype="torch.bfloat16")
    engine = tiny_engine(context, model=model, clip_grad_norm=0.5, reduce_bucket_size=3000)
    # A rate that moves weights across powers of two: a scale of the step before would be wrong.
    with Traffic() as traffic:
        losses = [
            float(engine.train_step(global_batch(step, 2 * MICRO_BATCHES, context.rank, 2), 0.3).loss)
            for step in range(STEPS)
        ]
    engine.optimizer.finish_gathering()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    context.close()
    return {"losses": losses, "weights": weights, "bytes": dict(traffic.num_bytes)}


@pytest.mark.parametrize("overlap", [False, True])
def test_isp_gathers_half_the_bytes_and_changes_no_bit(overlap: bool, ranks: Any) -> None:
    for whole, float8 in zip(
        ranks(2).run(gathering, False, overlap), ranks(2).run(gathering, True, overlap), strict=True
    ):
        assert float8["losses"] == whole["losses"]
        assert all(torch.equal(float8["weights"][name], weight) for name, weight in whole["weights"].items())
        # Per layer wqkv [128, 64], wo [64, 64] and the three of the MLP [96, 64]; gathered forward and backward.
        gathers = STEPS * MICRO_BATCHES * 2
        saved = gathers * len(FLOAT8_LAYERS) * (128 + 64 + 3 * 96) * 64
        assert whole["bytes"]["all_gather", 2] - float8["bytes"]["all_gather", 2] == saved
        # The maxima of five weights a layer, in fp32, once a step.
        extra = STEPS * len(FLOAT8_LAYERS) * 5 * 4
        assert float8["bytes"]["all_reduce", 2] - whole["bytes"]["all_reduce", 2] == extra


# -- weight gradients that come later -------------------------------------------------------------------------------


def test_postponed_weight_gradients_are_the_same_bits() -> None:
    """And so are the groups of layers that can postpone them and single layers."""
    single, grouped = (build(ParallelLayout(), {"postpone_weight_gradients": later}) for later in (False, True))
    run(*single)
    parallel = parallel_of(grouped[0])
    with parallel.weight_gradients.postpone("all"):
        run_without_end(*grouped)
    float8_weights = [
        layer.weight
        for name, layer in grouped[0].named_modules()
        if isinstance(layer, ParallelLinear) and parallel.is_float8(name)
    ]
    assert len(float8_weights) == 5 * len(FLOAT8_LAYERS) and all(weight.grad is None for weight in float8_weights)
    with torch.no_grad():
        parallel.weight_gradients.run("all")
    parallel.end_backward()
    found, wanted = (whole_gradients(*one) for one in (grouped, single))
    # Sums over micro batches come in another order.
    assert {n: d for n, d in worst(found, wanted).items() if not d <= TOLERANCE} == {}


@pytest.mark.parametrize("mode", ["1F1B", "ZBH1"])
def test_a_pipeline_equals_one_process(mode: str, ranks: Any) -> None:
    sizes = {"num_layers": 4, "intermediate_size": 64}
    alone = together([train(Run(steps=2, model=sizes, float8_layers=range(1, 3)))])
    found = together(ranks(2).run(train, Run(mode, pipeline=2, steps=2, model=sizes, float8_layers=range(1, 3))))
    # The first step computes the same bits in every micro batch; their gradients are summed in another order, in fp32.
    assert found.losses[0] == pytest.approx(alone.losses[0], rel=1e-7)
    assert found.norms[0] == pytest.approx(alone.norms[0], rel=1e-6)
    # The second starts from weights that differ by rounding, which may move single numbers across a border.
    assert found.losses[1] == pytest.approx(alone.losses[1], rel=1e-3)


# -- which layers ---------------------------------------------------------------------------------------------------


def test_only_linear_layers_of_the_chosen_layers_are_exchanged() -> None:
    for family, options in (("INTERNLM2", {}), ("LLAMA2", {"postpone_weight_gradients": True})):
        model, _ = build(ParallelLayout(), options, family)
        found = {
            name
            for name, module in model.named_modules()
            if isinstance(module, Float8Linear)
            or (isinstance(module, ParallelLinear) and module.group.kernels.is_float8)
        }
        projections = ("attention.wqkv",) if family == "INTERNLM2" else tuple(f"attention.w{x}" for x in "qkv")
        names = (*projections, "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
        assert found == {f"layers.{layer}.{name}" for layer in FLOAT8_LAYERS for name in names}


@pytest.mark.parametrize("options", [{}, {"postpone_weight_gradients": True}])
def test_a_width_without_whole_tiles_is_refused(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build_model("INTERNLM2", tiny_config(num_layers=3))
    context = ParallelContext.create(ParallelLayout())
    with pytest.raises(ConfigError, match=r"float8.enable_float8_linear.*layers.1.feed_forward.w.* is \[56, 32\]"):
        parallelize(model, context, options=ParallelOptions(float8_layers=range(1, 2), **options))


@pytest.mark.parametrize("mode", ["mtp", "fsp"])
def test_copies_of_key_value_heads_round_their_parts_of_the_gradient(mode: Any, ranks: Any) -> None:
    """Two ranks share a key-value head. Each rounds the gradient from its own queries; one process rounds the sum.

    Each of the three is off by a ninth at most (half a step of e5m2, 2^-3 / (1 + 2^-3)); the parts are about as large
    as the sum, and their errors independent, so that a norm is off by less than a ninth. Outputs are not concerned.
    """
    changes = {"num_kv_attention_heads": 1}
    wanted = on_rank(ParallelLayout(), {}, "INTERNLM2", changes)
    layout = ParallelLayout(world_size=2, tensor=2, mode=mode, kv_replicas=2)
    for rank, result in enumerate(ranks(2).run(on_rank, layout, {}, "INTERNLM2", changes)):
        hidden = wanted["hidden"].chunk(2, dim=1)[rank] if mode == "fsp" else wanted["hidden"]
        differences = worst(result, {**wanted, "hidden": hidden})
        assert differences.pop("hidden") <= TOLERANCE
        # What the backward pass computes before it comes to the last attention.
        for name in ("norm.weight", *(f"layers.2.feed_forward.w{n}.weight" for n in (1, 2, 3))):
            assert differences.pop(name) <= TOLERANCE
        assert differences["layers.2.attention.wqkv.weight"] > 1e-4
        assert max(differences.values()) < 1 / 9


# -- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"postpone_weight_gradients": True}], ids=["single layers", "groups"])
def test_inputs_are_kept_in_float8(options: dict[str, Any]) -> None:
    """No tensor of the size of an input is kept in bf16 by the layers, and none of the size of a weight anew."""
    model, context = build(ParallelLayout(), options, dtype="torch.bfloat16")
    layer = model.layers["1"].feed_forward.w2  # type: ignore[union-attr,operator]
    x = torch.randn(1, sum(LENGTHS), SIZES["intermediate_size"]).bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    new = [tensor for tensor in kept if tensor is not layer.weight and tensor.numel() > 8]
    assert [(tensor.dtype, tensor.numel()) for tensor in new] == [(torch.float8_e4m3fn, x.numel())]
    context.close()


def test_a_rank_without_rows_has_no_say_in_a_scale() -> None:
    large, none, small = torch.full((4, 16), 3.0), torch.empty(0, 16), torch.full((2, 16), 1.0)
    weights = [large], [none], [none, small, large], [small, none]
    scales = WeightScales()
    first, second, third, fourth = scales.of("a", weights, ())
    assert first == third == 2.0**-7 and fourth == 2.0**-8 and 0 < second < 2.0**-100
    large.fill_(1000.0)
    assert scales.of("a", weights, ())[0] == first, "kept until it is told that weights change"
    scales.forget()
    assert scales.of("a", weights, ())[0] == scales.of("a", weights, ())[2] == 4.0
