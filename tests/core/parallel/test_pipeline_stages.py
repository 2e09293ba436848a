"""Layers cut into stages, and the stages of a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from helpers.tiny import tiny_config, tiny_model
from torch import nn

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.pipeline_stages import LayerCosts, build_stages, split_layers
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.core.scheduler.stage_placement import Placement
from internlm.model.modules.norm import RMSNorm
from internlm.model.registry import build_model
from internlm.utils.errors import ConfigError


def sizes_of(layers: Sequence[range]) -> list[int]:
    """Sizes of ranges that follow each other from 0."""
    assert [part.stop for part in layers[:-1]] == [part.start for part in layers[1:]]
    assert layers[0].start == 0
    return [len(part) for part in layers]


def test_uniform_gives_what_is_left_over_to_the_last_stages() -> None:
    # InternEvo's partition_uniform: stage p gets one more when p >= num_stages - left.
    assert sizes_of(split_layers(8, 4)) == [2, 2, 2, 2]
    assert sizes_of(split_layers(10, 4)) == [2, 2, 3, 3]
    assert sizes_of(split_layers(5, 1)) == [5]


def test_by_cost_is_the_best_of_all_splits() -> None:
    for num_layers, num_stages, embedding, head in [
        (8, 4, 0.0, 0.0), (10, 4, 0.5, 2.5), (9, 3, 3.0, 0.25), (7, 2, 0.0, 20.0), (11, 5, 1.5, 1.5), (6, 6, 9.0, 1.0),
        (6, 1, 1.0, 1.0),
    ]:  # fmt: skip
        costs = LayerCosts(embedding, head)

        def judge(sizes: Sequence[int], embedding: float = embedding, head: float = head) -> tuple[float, float]:
            stages = [float(size) for size in sizes]
            stages[0] += embedding
            stages[-1] += head
            return max(stages), sum(stage**2 for stage in stages)

        found = sizes_of(split_layers(num_layers, num_stages, costs=costs))
        cuts = combinations(range(1, num_layers), num_stages - 1)
        options = [[b - a for a, b in pairwise((0, *cut, num_layers))] for cut in cuts]
        assert judge(found) == min(map(judge, options))
        assert sum(found) == num_layers


def test_the_users_own_sizes() -> None:
    assert sizes_of(split_layers(7, 3, sizes=[1, 4, 2])) == [1, 4, 2]
    for wrong in ([3, 4], [1, 4, 3], [0, 4, 3], []):
        with pytest.raises(ConfigError, match=r"^sizes = "):
            split_layers(7, 3, sizes=wrong)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_stages = 4 is more than num_layers = 3"):
        split_layers(3, 4)


# -- the stages of a rank -------------------------------------------------------------------------------------------

LAYERS = 5


def stages_of(shape: str, num_chunks: int, **changes: object) -> list[list[tuple[str, Any, Any]]]:
    """For each chunk of this rank: name, values and summed axes of its parameters."""
    world = dist.get_world_size()
    context = ParallelContext.create(ParallelLayout(world_size=world, pipeline=world))
    placement = Placement(world, num_chunks, shape)  # type: ignore[arg-type]
    make_model = partial(build_model, "INTERNLM2", tiny_config(num_layers=LAYERS, **changes))
    chunks = build_stages(make_model, context, placement, split_layers(LAYERS, placement.num_stages), seed=7)
    assert all(chunk.parallel.weight_gradients is chunks[0].parallel.weight_gradients for chunk in chunks)  # type: ignore[union-attr]
    if shape == "v" and changes and context.rank == 0:
        assert chunks[0].tok_embeddings.weight is chunks[1].tok_embeddings.weight  # type: ignore[union-attr]
    dist.barrier()  # a rank that closes at once would cut off one that is still connecting
    context.close()
    return [
        [(name, p.detach(), shard_spec_of(p).partial_over) for name, p in chunk.named_parameters()] for chunk in chunks
    ]


@pytest.mark.parametrize(
    ("shape", "num_chunks", "is_tied"),
    [("loop", 1, False), ("loop", 2, False), ("v", 2, False), ("loop", 1, True), ("loop", 2, True), ("v", 2, True)],
)
def test_stages_hold_the_weights_of_the_whole_model(
    ranks: Callable[[int], RankPool], shape: str, num_chunks: int, is_tied: bool
) -> None:
    changes = {"tie_word_embeddings": True} if is_tied else {}
    model = tiny_model(ParallelContext.create(), num_layers=LAYERS, **changes)
    whole = dict(model.named_parameters())
    held: dict[str, list[tuple[str, ...]]] = {}
    on_ranks = ranks(2).run(partial(stages_of, **changes), shape, num_chunks)
    for name, value, partial_over in [entry for chunks in on_ranks for chunk in chunks for entry in chunk]:
        assert torch.equal(value, whole[name]), name
        held.setdefault(name, []).append(partial_over)
    assert held.keys() == whole.keys()
    # A tied embedding is summed over the two ranks that hold it; where these are one, nothing is to be summed.
    tied = {"tok_embeddings.weight": [("pipeline_ends",)] * 2 if shape == "loop" else [(), ()]} if is_tied else {}
    assert held == {name: [()] for name in whole} | tied
    first_rank = {name for chunk in on_ranks[0] for name, _, _ in chunk}
    assert ("norm.weight" in first_rank) == (shape == "v")


def refuse() -> str:
    context = ParallelContext.create(ParallelLayout(world_size=2, pipeline=2))
    with pytest.raises(ConfigError) as error:
        build_stages(lambda: nn.Linear(2, 2), context, Placement(2), split_layers(2, 2))
    dist.barrier()  # a rank that closes at once would cut off one that is still connecting
    context.close()
    return str(error.value)


def test_a_model_that_cannot_be_cut_is_refused(ranks: Callable[[int], RankPool]) -> None:
    for message in ranks(2).run(refuse):
        assert "2 stages: Linear cannot be cut, as it lacks keep_stage" in message


def test_without_a_pipeline_any_model_will_do() -> None:
    make_model = partial(RMSNorm, 3, 1e-6, torch.float32)
    (model,) = build_stages(make_model, ParallelContext.create(), Placement(1), split_layers(1, 1))
    assert not model.weight.is_meta  # type: ignore[union-attr]
