"""Rules on the sizes of groups: they fill the world, and each mode has the groups that it can use."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config


def fsdp(config: Config, world_size: int) -> Iterator[Problem]:
    """FSDP goes with neither a pipeline nor isp."""
    parallel = config.parallel
    if not parallel.uses_fsdp:
        return
    key = "parallel.fsdp.enable" if parallel.fsdp.enable else "parallel.zero1.fsdp"
    if parallel.pipeline.size > 1:
        size = parallel.pipeline.size
        yield Problem(
            (key, "parallel.pipeline.size"),
            f"{key} = True does not go with parallel.pipeline.size = {size}; set one of them to its default",
        )
    if parallel.tensor.mode == "isp":
        yield Problem(
            (key, "parallel.tensor.mode"),
            f"{key} = True does not go with parallel.tensor.mode = 'isp', which splits weights itself; turn it off",
        )


def weight_parallel(config: Config, world_size: int) -> Iterator[Problem]:
    """Weight parallelism is part of isp."""
    size, mode = config.parallel.weight.size, config.parallel.tensor.mode
    if size > 1 and mode != "isp":
        yield Problem(
            ("parallel.weight.size", "parallel.tensor.mode"),
            f"parallel.weight.size = {size} needs parallel.tensor.mode = 'isp', which is {mode!r}; "
            "set the mode to 'isp' or the size to 1",
        )


def zero(config: Config, world_size: int) -> Iterator[Problem]:
    """The optimizer's state is split over a divisor of the ranks that hold the same weights."""
    size, ranks = config.parallel.zero1.size, weight_data_ranks(config, world_size)
    if size > 0 and ranks is not None and ranks % size:
        allowed = ", ".join(str(d) for d in range(1, ranks + 1) if ranks % d == 0)
        yield Problem(
            ("parallel.zero1.size",),
            f"parallel.zero1.size = {size} does not divide the {ranks} data-parallel ranks (world size {world_size}); "
            f"use -1 (all of them) or one of {allowed}",
        )


def world(config: Config, world_size: int) -> Iterator[Problem]:
    """Every view of the ranks covers all of them."""
    parallel = config.parallel
    views = [("parallel.tensor.size", parallel.tensor.size)]
    if parallel.tensor.mode == "isp":
        views.append(("parallel.weight.size", parallel.weight.size))
    for path, size in views:
        if world_size % (size * parallel.pipeline.size):
            yield Problem(
                (path, "parallel.pipeline.size"),
                f"{path} = {size} times parallel.pipeline.size = {parallel.pipeline.size} does not divide the "
                f"world size {world_size}; start a multiple of {size * parallel.pipeline.size} ranks",
            )
    expert, data = parallel.expert.size, data_ranks(config, world_size)
    if config.model.num_experts > 1 and expert > 0 and data is not None:
        expert_weight = parallel.expert_weight.size if parallel.tensor.mode == "isp" else 1
        spread = data * (parallel.tensor.size if parallel.expert.no_tp or parallel.tensor.mode == "isp" else 1)
        if spread % (expert * expert_weight):
            yield Problem(
                ("parallel.expert.size", "parallel.expert_weight.size"),
                f"parallel.expert.size = {expert} times parallel.expert_weight.size = {expert_weight} does not divide "
                f"the {spread} ranks that experts are spread over",
            )


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
            f"{path}.device_placement_strategy.interleaved = True does not go with head_first = True and "
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


def weight_data_ranks(config: Config, world_size: int) -> int | None:
    """Ranks that hold the same weights: for isp the weight view counts, else these are the data ranks."""
    parallel = config.parallel
    if parallel.tensor.mode != "isp":
        return data_ranks(config, world_size)
    return _quotient(world_size, parallel.weight.size * parallel.pipeline.size)


def _quotient(whole: int, part: int) -> int | None:
    return None if whole % part else whole // part
