"""Rules on experts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from internlm.config.problem import Problem
from internlm.config.rules.layout_problems import layout_problems
from internlm.config.rules.ranks import expert_inner_ranks, expert_ranks
from internlm.config.schema import Config
from internlm.utils.layout_checks import check_width, check_world, check_zero


def experts(config: Config, world_size: int) -> Iterator[Problem]:
    """Requirements of experts; a dense model must not have expert parallelism."""
    parallel, experts = config.parallel, config.model.num_experts
    if experts <= 1:
        for path, size in (
            ("parallel.expert.size", parallel.expert.size),
            ("parallel.expert_weight.size", parallel.expert_weight.size),
        ):
            if size > 1:
                yield Problem(
                    (path, "model.num_experts"),
                    f"{path} = {size}: the model is dense (model.num_experts = {experts}); set it to 1",
                )
        return
    if parallel.expert.size > 0 and experts % parallel.expert.size:
        yield Problem(
            ("model.num_experts", "parallel.expert.size"),
            f"model.num_experts = {experts} is not divisible by parallel.expert.size = {parallel.expert.size}",
        )
    expert, inner = expert_ranks(config, world_size), expert_inner_ranks(config)
    names = {"expert": "parallel.expert.size", "pipeline": "parallel.pipeline.size"}
    names["inner"] = "parallel.expert_weight.size" if parallel.tensor.mode == "isp" else "parallel.tensor.size"
    degrees = {"expert": expert, "pipeline": parallel.pipeline.size, **({"inner": inner} if inner > 1 else {})}
    problems = list(layout_problems(partial(check_world, world_size, **degrees), names))
    yield from problems
    if not problems:
        holders = world_size // math.prod(degrees.values())
        check_state = partial(check_zero, parallel.expert_zero1.size, holders)
        yield from layout_problems(check_state, {"zero": "parallel.expert_zero1.size"})
    if config.model.top_k > experts:
        yield Problem(
            ("model.top_k", "model.num_experts"),
            f"model.top_k = {config.model.top_k} is more than model.num_experts = {experts}; choose at most so many",
        )


def width(config: Config, world_size: int) -> Iterator[Problem]:
    """Tensor ranks that split experts get equal parts of each."""
    model = config.model
    if config.parallel.tensor.mode == "isp" or expert_inner_ranks(config) == 1:
        return
    key = "model.intermediate_size" if model.moe_intermediate_size is None else "model.moe_intermediate_size"
    names = {"width": key, "tensor": "parallel.tensor.size"}
    for problem in layout_problems(partial(check_width, model.expert_size, expert_inner_ranks(config)), names):
        yield Problem(
            ("parallel.expert.no_tp", *problem.keys),
            f"parallel.expert.no_tp = False: {problem.text}, or parallel.expert.no_tp = True",
        )
