"""Rules on the sizes of groups: they fill the world, and each mode has the groups that it can use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from internlm.config.problem import Problem
from internlm.config.rules.layout_problems import layout_problems
from internlm.config.schema import Config
from internlm.utils.layout_checks import check_fsdp, check_weight, check_window, check_world, check_zero

MODE = "parallel.tensor.mode"
PIPELINE = "parallel.pipeline.size"
TENSOR = "parallel.tensor.size"
CONTEXT = "parallel.context.size"
SEQUENCE_2D = "parallel.sequence_2D"
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
    names = {"tensor": TENSOR, "context": CONTEXT, "weight": WEIGHT, "pipeline": PIPELINE}
    # With sequence_2D, context ranks are a part of the tensor group.
    context = {} if parallel.context.size == 1 else {"context": parallel.context.size}
    views = [{"tensor": parallel.tensor.size, **context}]
    if parallel.tensor.mode == "isp":
        views.append({"weight": parallel.weight.size})
    for sizes in views:
        yield from layout_problems(partial(check_world, world_size, **sizes, pipeline=parallel.pipeline.size), names)


def context(config: Config, world_size: int) -> Iterator[Problem]:
    """The windows of a double ring are equal, and it is a ring."""
    context = config.parallel.context
    names = {"window_size": "parallel.context.window_size", "context": CONTEXT}
    yield from layout_problems(partial(check_window, context.window_size, context.size), names)
    window, exchange = config.parallel.context_window, context.exchange
    if window > 1 and exchange not in ("auto", "ring"):
        key = f"{SEQUENCE_2D if config.parallel.sequence_2D.enable else 'parallel.context'}.window_size"
        yield Problem(
            ("parallel.context.exchange", key),
            f"parallel.context.exchange = {exchange!r} does not work with {key} = {window}, which is a double ring; "
            f"set parallel.context.exchange = 'ring', or {key} = 1",
        )


def sequence_2d(config: Config, world_size: int) -> Iterator[Problem]:
    """Heads times context is the sequence group of isp; placement."""
    parallel, two, path = config.parallel, config.parallel.sequence_2D, SEQUENCE_2D
    if not two.enable:
        return
    if parallel.tensor.mode != "isp":
        yield Problem(
            (f"{path}.enable", MODE),
            f"{path}.enable = True needs {MODE} = 'isp', which is {parallel.tensor.mode!r}; in this mode use {CONTEXT}",
        )
    for key in ("size", "window_size"):
        if getattr(parallel.context, key) > 1:
            yield Problem(
                (f"parallel.context.{key}", f"{path}.enable"),
                f"parallel.context.{key} = {getattr(parallel.context, key)} does not work with {path}.enable = True, "
                f"whose context_size and window_size are used; set it to 1",
            )
    if two.head_size * two.context_size != parallel.tensor.size:
        yield Problem(
            (f"{path}.head_size", f"{path}.context_size", TENSOR),
            f"{path}.head_size = {two.head_size} times context_size = {two.context_size} must be "
            f"{TENSOR} = {parallel.tensor.size}",
        )
    placement = two.device_placement_strategy
    strategy = f"{path}.device_placement_strategy"
    names = {
        "window_size": f"{path}.window_size",
        "context": f"{path}.context_size",
        "interleaved": f"{strategy}.interleaved",
    }
    interleaved = placement.interleaved and two.window_size > 1
    yield from layout_problems(partial(check_window, two.window_size, two.context_size, interleaved=interleaved), names)
    if placement.head_first and two.head_size > 1 and placement.interleaved:
        yield Problem(
            (f"{strategy}.interleaved",),
            f"{strategy}.interleaved = True does not work with head_first = True and "
            f"head_size = {two.head_size}; set it to False",
        )


def data_ranks(config: Config, world_size: int) -> int | None:
    """Ranks with different data, or None when the sizes do not divide the world."""
    parallel = config.parallel
    return _quotient(world_size, parallel.tensor_ranks * parallel.context_ranks * parallel.pipeline.size)


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
    """Ranks that hold the same weights, or None when the sizes do not divide the world."""
    parallel = config.parallel
    if parallel.tensor.mode == "isp":
        return _quotient(world_size, parallel.weight.size * parallel.pipeline.size)
    ranks = data_ranks(config, world_size)
    return None if ranks is None else ranks * parallel.context_ranks


def _quotient(whole: int, part: int) -> int | None:
    return None if whole % part else whole // part
