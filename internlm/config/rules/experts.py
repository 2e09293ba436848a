"""Rules on experts."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.rules.ranks import data_ranks
from internlm.config.schema import Config


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
    if parallel.uses_fsdp:
        yield Problem(
            ("model.num_experts", "parallel.fsdp.enable", "parallel.zero1.fsdp"),
            f"model.num_experts = {experts} does not work with FSDP; turn FSDP off",
        )
    zero = config.hybrid_zero_optimizer
    if zero.overlap_sync_grad and zero.overlap_sync_param:
        yield Problem(
            ("hybrid_zero_optimizer.overlap_sync_param", "hybrid_zero_optimizer.overlap_sync_grad"),
            "hybrid_zero_optimizer.overlap_sync_param and overlap_sync_grad may not both be True with "
            f"model.num_experts = {experts}; set one to False",
        )
    if parallel.expert_weight.size > 1 and parallel.tensor.mode != "isp":
        yield Problem(
            ("parallel.expert_weight.size", "parallel.tensor.mode"),
            f"parallel.expert_weight.size = {parallel.expert_weight.size} needs parallel.tensor.mode = 'isp'",
        )
    data = data_ranks(config, world_size)
    if data is None:
        return
    if parallel.zero1.size > 0 and parallel.zero1.size != data:
        yield Problem(
            ("parallel.zero1.size", "model.num_experts"),
            f"parallel.zero1.size = {parallel.zero1.size}: with experts it must be -1 or all {data} data ranks",
        )
    expert = parallel.expert.size
    if expert > 0 and experts % expert:
        yield Problem(
            ("model.num_experts", "parallel.expert.size"),
            f"model.num_experts = {experts} is not divisible by parallel.expert.size = {expert}",
        )
    if data % experts and experts % data:
        yield Problem(
            ("model.num_experts",),
            f"model.num_experts = {experts} and the {data} data ranks: one must divide the other",
        )
