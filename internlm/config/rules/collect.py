"""All rules, in the order in which their mistakes are reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from internlm.config.mistakes import Mistake
from internlm.config.rules import cuda_graphs, experts, float8, model, pipeline, ranks, run, splits
from internlm.config.schema import Config

Rule = Callable[[Config, int], Iterator[Mistake]]
"""(config, world size) -> the mistakes found."""

RULES: tuple[Rule, ...] = (
    ranks.fsdp,
    run.accumulation,
    run.saving,
    run.places,
    run.model_changes,
    model.interleaving_of_heads,
    ranks.weight_parallel,
    pipeline.schedule,
    pipeline.layers,
    model.attention_backend,
    model.recomputation,
    cuda_graphs.graphs,
    experts.experts,
    ranks.sequence_2d,
    ranks.zero,
    ranks.world,
    splits.heads,
    splits.feed_forward,
    splits.sequence,
    run.batches,
    model.shape,
    run.numerics,
    float8.formats,
    float8.dimensions,
)


def find_mistakes(config: Config, world_size: int) -> Iterator[Mistake]:
    """Every mistake between the keys of a config that is to run on `world_size` ranks."""
    for rule in RULES:
        yield from rule(config, world_size)
