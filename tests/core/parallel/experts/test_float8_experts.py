"""The experts of a layer in float8 in every form in which ranks hold them, on operands of many sizes, in float64.

Scales are powers of two: a wrong one changes only numbers that are small beside the largest, as those of a later rank
here are. Sums differ by float64's rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.tiny import tiny_config
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.model.moe.experts import Experts
from internlm.model.ops.float8.grouped_kernels import Float8GroupedKernels
from internlm.model.registry import build_model
from internlm.utils.errors import ConfigError

HIDDEN, WIDTH = 32, 64
SIZES = {"num_layers": 1, "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "num_attention_heads": 2}
EXPERTS = {"num_experts": 4, "top_k": 2, "moe_type": "Dropless"}
COUNTS = ((5, 0, 1, 18), (0, 0, 24, 0), (0, 0, 0, 0))
TOLERANCE = {"out": 1e-13, "rows": 1e-13, "w13": 24 * 2.0**-32, "w2": 24 * 2.0**-32}
"""Gradients of weights are sums over up to 24 rows. The smallest number of e5m2 is 2^-32 of the largest: below it,
numbers of parts with scales of their own are rounded otherwise."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "split over tensor ranks": {"world_size": 2, "tensor": 2, "mode": "mtp", "expert_inner": 2},
    "gathered": {"world_size": 2, "mode": "isp", "expert_inner": 2},
    "gathered, parts of experts": {"world_size": 3, "mode": "isp", "expert_inner": 3},
}


def built(layout: ParallelLayout, **options: Any) -> tuple[nn.Module, Experts, ParallelContext]:
    context = ParallelContext.create(layout)
    with torch.device("meta"):
        model = build_model("QWEN3MOE", tiny_config(**SIZES, **EXPERTS)).double()
    chosen = ParallelOptions(**{"float8_layers": range(1), "reduce_dtype": torch.float64, **options})
    parallelize(model, context, seed=7, options=chosen)
    experts = model.get_submodule("layers.0.feed_forward.experts")
    assert isinstance(experts, Experts)
    return model, experts, context


@torch.no_grad()
def spread_out(experts: Experts) -> None:
    """Numbers of many sizes: smaller ones for later channels of the width of an expert, and for later experts."""
    for parameter, dim in ((experts.w13, 1), (experts.w2, 2)):
        spec = shard_spec_of(parameter)
        shape = spec.global_shape
        channel = torch.arange(shape[dim]) % WIDTH
        sizes = torch.exp2(-(channel / 12).floor()).view(-1, *[1] * (2 - dim)) * torch.exp2(
            -3 * torch.arange(shape[0])
        ).view(-1, 1, 1)
        for box in spec.boxes:
            parameter[box.local_slices()] *= 50 * sizes.expand(shape)[box.global_slices()]


def results(layout: ParallelLayout, counts: tuple[int, ...], **options: Any) -> dict[str, Tensor]:
    """The output, and all whole gradients, for rows that all ranks have."""
    model, experts, context = built(layout, **options)
    spread_out(experts)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(counts), HIDDEN, generator=generator, dtype=torch.float64)
    rows = (rows * torch.exp2(-torch.arange(len(rows)) % 4.0).unsqueeze(-1)).requires_grad_()
    out = experts(rows, torch.tensor(counts))
    # Gathered experts: as if all ranks but one had no share in the loss.
    is_part = layout.mode == "mtp" or context.rank == 0
    (out * is_part * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum().backward()
    parallel_of(model).end_backward()
    found = {"out": out.detach().clone(), "rows": torch.zeros_like(rows) if rows.grad is None else rows.grad}
    for name, parameter in (("w13", experts.w13), ("w2", experts.w2)):
        spec = shard_spec_of(parameter)
        assert parameter.grad is not None
        found[name] = torch.zeros(spec.global_shape, dtype=torch.float64)
        for box in spec.boxes:
            found[name][box.global_slices()] = parameter.grad[box.local_slices()]
    if context.world_size > 1:
        for name, value in found.items():
            if layout.mode == "mtp" or name != "out":
                all_reduce(value, dist.group.WORLD)
    context.close()
    return found


def deviations(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Of each number, relative to the largest of its row, or of its expert: small ones count, too.

    Not rows of a gradient of a weight, in which numbers are rounded relative to the largest of the expert.
    """
    worst = {}
    for name, value in wanted.items():
        dims = tuple(range(1, value.dim()))
        sizes = value.abs().amax(dims, keepdim=True).clamp(min=1e-300)
        worst[name] = float(((found[name] - value) / sizes).abs().max()) if value.numel() else 0.0
    return worst


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one process"])
def test_every_form_equals_one_process(layout: str, counts: tuple[int, ...], ranks: Any) -> None:
    wanted = results(ParallelLayout(), counts)
    chosen = ParallelLayout(**LAYOUTS[layout])
    for found in ranks(chosen.world_size).run(results, chosen, counts):
        assert {name: d for name, d in deviations(found, wanted).items() if not d <= TOLERANCE[name]} == {}


def without_reduction(layout: ParallelLayout, counts: tuple[int, ...]) -> dict[str, Tensor]:
    """Results when each rank takes the scales of its part of a row or weight."""
    right = Float8GroupedKernels.compute_scales

    def wrong(kernels: Float8GroupedKernels, rows: Tensor, weight: Any) -> list[Tensor]:
        kernels._reduce_amax = None
        return right(kernels, rows, weight)

    Float8GroupedKernels.compute_scales = wrong  # type: ignore[method-assign]
    try:
        return results(layout, counts)
    finally:
        Float8GroupedKernels.compute_scales = right  # type: ignore[method-assign]


def test_a_scale_of_a_part_is_found(ranks: Any) -> None:
    wanted = results(ParallelLayout(), COUNTS[0])
    (found, _) = ranks(2).run(without_reduction, ParallelLayout(**LAYOUTS["split over tensor ranks"]), COUNTS[0])
    assert max(deviations(found, wanted).values()) > 1e-6


def test_postponed_weight_gradients_are_the_same() -> None:
    wanted = results(ParallelLayout(), COUNTS[0])
    model, experts, context = built(ParallelLayout(), postpone_weight_gradients=True)
    spread_out(experts)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(24, HIDDEN, generator=generator, dtype=torch.float64)
    rows = rows * torch.exp2(-torch.arange(24) % 4.0).unsqueeze(-1)
    gradients = parallel_of(model).weight_gradients
    with gradients.postpone("all"):
        out = experts(rows, torch.tensor(COUNTS[0]))
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum().backward()
    assert experts.w13.grad is None and experts.w2.grad is None
    with torch.no_grad():
        gradients.run("all")
    for name in ("w13", "w2"):
        assert torch.equal(getattr(experts, name).grad, wanted[name])
    context.close()


@pytest.mark.parametrize(
    ("layout", "width", "named"),
    [
        ({}, 40, r"'layers.0.feed_forward.experts.w13' is \[80, 32\]|'layers.0.feed_forward.experts.w2' is \[32, 40\]"),
        ({"world_size": 2, "tensor": 2, "mode": "mtp", "expert_inner": 2}, 48, r"experts.w2' is \[32, 24\]"),
    ],
)
def test_odd_widths_are_refused(layout: dict[str, Any], width: int, named: str) -> None:
    context = ParallelContext(ParallelLayout(**layout), 0, torch.device("cpu"))
    with torch.device("meta"):
        model = build_model("QWEN3MOE", tiny_config(**{**SIZES, "moe_intermediate_size": width}, **EXPERTS))
    with pytest.raises(ConfigError, match=named):
        parallelize(model, context, options=ParallelOptions(float8_layers=range(1)))


def test_rows_are_kept_in_float8() -> None:
    _, experts, context = built(ParallelLayout())
    rows = torch.randn(24, HIDDEN, dtype=torch.float64).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts.linear13(rows, experts.w13, torch.tensor(COUNTS[0]))
    assert [tensor.dtype for tensor in kept if tensor.numel() > 24] == [torch.float8_e4m3fn]
    context.close()
