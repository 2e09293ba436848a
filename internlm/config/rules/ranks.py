"""Rules on the sizes of groups: they fill the world, and each mode has the groups that it can use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from internlm.config.problem import Problem
from internlm.config.rules.layout_problems import layout_problems
from internlm.config.schema import Config
from internlm.utils.layout_checks import check_fsdp, check_weight, check_world, check_zero

MODE = "parallel.tensor.mode"
PIPELINE = "parallel.pipeline.size"
TENSOR = "parallel.tensor.size"
WEIGHT = "parallel.weight.size"


def fsdp(config: Config, world_size: int) -> Iterator[Problem]:
    """FSDP goes with neither a pipeline nor isp."""
    parallel = config.parallel
    names = {
        "fsdp": "parallel.fsdp.enable" if parallel.fsdp.enable else "parallel.zero1.fsdp",
        "pipeline": PIPELINE,
        "mode": MODE,
    }
    check = partial(check_fsdp, parallel.uses_fsdp, parallel.pipeline.size, parallel.tensor.mode)
    yield from layout_problems(check, names)


def weight_parallel(config: Config, world_size: int) -> Iterator[Problem]:
    """Weight parallelism is part of isp."""
    check = partial(check_weight, config.parallel.weight.size, config.parallel.tensor.mode)
    yield from layout_problems(check, {"weight": WEIGHT, "mode": MODE})


def expert_weight_parallel(config: Config, world_size: int) -> Iterator[Problem]:
    """Weight parallelism of experts is part of isp too."""
    size = config.parallel.expert_weight.size if config.model.num_experts > 1 else 1
    check = partial(check_weight, size, config.parallel.tensor.mode)
    yield from layout_problems(check, {"weight": "parallel.expert_weight.size", "mode": MODE})


def zero(config: Config, world_size: int) -> Iterator[Problem]:
    """The optimizer's state is split over a divisor of the ranks that hold the same weights."""
    ranks = weight_data_ranks(config, world_size)
    if ranks is not None:
        check = partial(check_zero, config.parallel.zero1.size, ranks)
        yield from layout_problems(check, {"zero": "parallel.zero1.size"})


def world(config: Config, world_size: int) -> Iterator[Problem]:
    """Every view of the ranks covers all of them."""
    parallel = config.parallel
    views = {"tensor": parallel.tensor.size}
    if parallel.tensor.mode == "isp":
        views["weight"] = parallel.weight.size
    for axis, size in views.items():
        check = partial(check_world, world_size, **{axis: size}, pipeline=parallel.pipeline.size)
        yield from layout_problems(check, {"tensor": TENSOR, "weight": WEIGHT, "pipeline": PIPELINE})


def sequence_2d(config: Config, world_size: int) -> Iterator[Problem]:
    """Heads times context is the sequence group; placement."""
    two, tensor = config.parallel.sequence_2D, config.parallel.tensor.size
    if not two.enable:
        return
    path = "parallel.sequence_2D"
    if two.head_size * two.context_size != tensor:
        yield Problem(
            (f"{path}.head_size", f"{path}.context_size", "parallel.tensor.size"),
            f"{path}.head_size = {two.head_size} times context_size = {two.context_size} must be "
            f"parallel.tensor.size = {tensor}",
        )
    if two.context_size % two.window_size:
        yield Problem(
            (f"{path}.window_size", f"{path}.context_size"),
            f"{path}.window_size = {two.window_size} does not divide context_size = {two.context_size}",
        )
    placement = two.device_placement_strategy
    if placement.head_first and two.head_size > 1 and placement.interleaved:
        yield Problem(
            (f"{path}.device_placement_strategy.interleaved",),
            f"{path}.device_placement_strategy.interleaved = True does not work with head_first = True and "
            f"head_size = {two.head_size}; set it to False",
        )
    if config.data.use_packed_dataset:
        yield Problem(
            ("data.use_packed_dataset", f"{path}.enable"),
            f"data.use_packed_dataset = True: {path} works on rows of one length; set it to False",
        )


def data_ranks(config: Config, world_size: int) -> int | None:
    """Ranks with different data, or None when the sizes do not divide the world."""
    return _quotient(world_size, config.parallel.tensor.size * config.parallel.pipeline.size)


def expert_ranks(config: Config, world_size: int) -> int:
    """Ranks over which the experts of a layer are dealt; 1 if the sizes do not fit.

    By default the largest divisor of their number that also divides the ranks of a pipeline stage over which an expert
    is not split; with FSDP, which shards experts like other weights, 1.
    """
    experts, size = config.model.num_experts, config.parallel.expert.size
    if experts <= 1:
        return 1
    if size > 0:
        return size
    stage = _quotient(world_size, config.parallel.pipeline.size * expert_inner_ranks(config))
    if stage is None or config.parallel.uses_fsdp:
        return 1
    return math.gcd(experts, stage)


def expert_inner_ranks(config: Config) -> int:
    """Ranks over which each expert is split: its weights in isp, in the other modes its width."""
    parallel = config.parallel
    if config.model.num_experts <= 1:
        return 1
    if parallel.tensor.mode == "isp":
        return parallel.expert_weight.size
    return 1 if parallel.expert.no_tp else parallel.tensor.size


def weight_data_ranks(config: Config, world_size: int) -> int | None:
    """Ranks that hold the same weights: for isp the weight view counts, else these are the data ranks."""
    parallel = config.parallel
    if parallel.tensor.mode != "isp":
        return data_ranks(config, world_size)
    return _quotient(world_size, parallel.weight.size * parallel.pipeline.size)


def _quotient(whole: int, part: int) -> int | None:
    return None if whole % part else whole // part
