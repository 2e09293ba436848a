"""torch's own pipeline runtime over the same stages computes the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from helpers.tiny import VOCAB, tiny_config
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.nn import functional as F

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.parallel.pipeline_stages import build_stages, split_layers
from internlm.core.scheduler.stage_placement import Placement
from internlm.data.batch import Batch, MicroBatch
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer

MICRO_BATCHES, LENGTH, LAYERS = 4, 11, 4

TOLERANCE = 1e-5
"""Relative to the largest gradient of a weight. The two compute cross entropy in different ways, in fp32: an epsilon
(1.2e-7) a token and layer, over 11 tokens and 4 layers."""


class WithoutPositions(nn.Module):
    """A chunk as torch's runtime calls it: one argument, logits at the end."""

    def __init__(self, chunk: nn.Module) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.chunk(inputs, torch.arange(LENGTH).expand(inputs.shape[0], -1))
        return self.chunk.logits(hidden) if self.chunk.is_last else hidden  # type: ignore[operator,return-value]


def chunks_of(context: ParallelContext, num_chunks: int) -> list[nn.Module]:
    placement = Placement(context.size("pipeline"), num_chunks)
    make_model = partial(build_model, "INTERNLM2", tiny_config(num_layers=LAYERS))
    return build_stages(make_model, context, placement, split_layers(LAYERS, placement.num_stages), seed=7)


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (MICRO_BATCHES, LENGTH + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def ours(context: ParallelContext, num_chunks: int) -> dict[str, Tensor]:
    chunks = chunks_of(context, num_chunks)
    optimizer = HybridZeroOptimizer(chunks, context)
    positions = torch.arange(LENGTH)[None]
    batch = Batch(
        [
            MicroBatch(ids[None], labels[None], positions, torch.zeros_like(labels)[None], None, None, LENGTH)
            for ids, labels in zip(*tokens(), strict=True)
        ],
        num_samples=MICRO_BATCHES,
    )
    Engine(chunks, optimizer, context, linear_cross_entropy).train_step(batch, 0.0)
    return {name: piece.clone() for name, _, pieces in optimizer.sharded_gradients() for _, piece in pieces}


def theirs(context: ParallelContext, num_chunks: int) -> dict[str, Tensor]:
    chunks = chunks_of(context, num_chunks)
    world, rank = context.world_size, context.rank
    stages = [
        PipelineStage(WithoutPositions(chunk), number * world + rank, world * num_chunks, torch.device("cpu"))
        for number, chunk in enumerate(chunks)
    ]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (MICRO_BATCHES * LENGTH)

    schedule = (
        Schedule1F1B(stages[0], MICRO_BATCHES, loss, scale_grads=False)
        if num_chunks == 1
        else ScheduleInterleaved1F1B(stages, MICRO_BATCHES, loss, scale_grads=False)  # type: ignore[arg-type]
    )
    ids, labels = tokens()
    losses: list[Tensor] = []
    if rank == 0:
        schedule.step(ids)
    else:
        schedule.step(target=labels, losses=losses)
    return {name: p.grad for chunk in chunks for name, p in chunk.named_parameters() if p.grad is not None}


def largest_differences(num_chunks: int) -> dict[str, float]:
    context = ParallelContext.create(ParallelLayout(world_size=2, pipeline=2))
    found, expected = ours(context, num_chunks), theirs(context, num_chunks)
    dist.barrier()
    context.close()
    assert found.keys() == expected.keys()
    return {name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in found}


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_torchs_schedules_give_the_same_gradients(ranks: Callable[[int], RankPool], num_chunks: int) -> None:
    for differences in ranks(2).run(largest_differences, num_chunks):
        assert differences and max(differences.values()) < TOLERANCE
