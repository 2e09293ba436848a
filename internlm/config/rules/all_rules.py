"""All rules between keys, in the order in which their problems are reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from internlm.config.problem import Problem
from internlm.config.rules import (
    blend,
    capacity,
    cuda_graphs,
    experts,
    float8,
    hf_class,
    model,
    multi_token,
    multiple_choice,
    packing,
    pipeline,
    positions,
    ranks,
    remote,
    replay,
    rows,
    run,
    sample_texts,
    splits,
    valid_sets,
    vision,
)
from internlm.config.schema import Config

Rule = Callable[[Config, int], Iterator[Problem]]
"""(config, world size) -> the problems found."""

RULES: tuple[Rule, ...] = (
    hf_class.hf_class,
    ranks.fsdp,
    run.accumulation,
    run.saving,
    run.places,
    run.model_changes,
    model.interleaving_of_heads,
    ranks.weight_parallel,
    ranks.expert_weight_parallel,
    pipeline.schedule,
    pipeline.layers,
    model.attention_backend,
    model.recomputation,
    cuda_graphs.graphs,
    experts.experts,
    replay.routing,
    experts.width,
    capacity.capacity,
    ranks.context,
    ranks.sequence_2d,
    ranks.zero,
    ranks.world,
    splits.heads,
    splits.feed_forward,
    splits.sequence,
    run.batches,
    run.token_arrays,
    run.bad_data,
    run.mocked,
    run.xtuner_names,
    valid_sets.held_out_documents,
    valid_sets.named_sets,
    sample_texts.sample_texts,
    multiple_choice.multiple_choice,
    remote.remote_data,
    rows.streaming,
    blend.blend,
    packing.packing,
    packing.fill_in_the_middle,
    vision.documents_with_pictures,
    model.shape,
    positions.pretrained_length,
    positions.sequence_length,
    multi_token.multi_token,
    vision.vision_model,
    run.numerics,
    float8.formats,
    float8.dimensions,
)


def find_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """Every problem between the keys of a config that is to run on `world_size` ranks."""
    for rule in RULES:
        yield from rule(config, world_size)
