"""Rules on pipelines: what each schedule needs, and which layers a stage gets."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.rules.run import parse_ramp
from internlm.config.schema import Config

SIZE = "parallel.pipeline.size"


def schedule(config: Config, world_size: int) -> Iterator[Problem]:
    """Chunks and micro-batches that a schedule works with."""
    pipeline, data, chunks = config.parallel.pipeline, config.data, config.model.num_chunks
    if pipeline.size == 1:
        return
    if pipeline.mode == "ZBH1" and chunks > 1:
        yield Problem(
            ("model.num_chunks", "parallel.pipeline.mode"),
            f"model.num_chunks = {chunks} does not go with parallel.pipeline.mode = 'ZBH1'; set it to 1",
        )
    if pipeline.mode != "1F1B" or chunks == 1:
        return
    needs = f"the interleaved schedule (model.num_chunks = {chunks}) needs a multiple of {SIZE} = {pipeline.size}"
    if data.micro_num % pipeline.size:
        yield Problem(
            ("data.micro_num", SIZE, "model.num_chunks"),
            f"data.micro_num = {data.micro_num}: {needs}",
        )
        return
    odd = [number for number in _micro_nums_of_ramp(config) if number % pipeline.size]
    if odd:
        yield Problem(
            ("data.rampup_batch_size", SIZE, "model.num_chunks"),
            f"data.rampup_batch_size = {data.rampup_batch_size!r} gives steps of {odd[0]} micro-batches: {needs}",
        )


def _micro_nums_of_ramp(config: Config) -> list[int]:
    """Micro-batches of the steps before the ramp has come to data.micro_num, in order."""
    ramp = parse_ramp(config.data.rampup_batch_size)
    if ramp is None:
        return []
    start, increment, steps = ramp
    reached = -(-config.data.total_steps // steps)
    return list(range(start, config.data.micro_num, increment))[:reached]


def layers(config: Config, world_size: int) -> Iterator[Problem]:
    """Every chunk of every stage has a layer; a list of layers says how many each has."""
    pipeline, model = config.parallel.pipeline, config.model
    if pipeline.size == 1:
        return
    parts = pipeline.size * model.num_chunks
    if parts > model.num_layers:
        yield Problem(
            (SIZE, "model.num_chunks", "model.num_layers"),
            f"{SIZE} = {pipeline.size} times model.num_chunks = {model.num_chunks} is more than model.num_layers = "
            f"{model.num_layers}, and each chunk of a stage needs a layer; use fewer stages",
        )
        return
    split, key = pipeline.layer_split, "parallel.pipeline.layer_split"
    if isinstance(split, str):
        return
    text = f"{key} = {list(split)}"
    if len(split) != parts:
        yield Problem(
            (key, SIZE, "model.num_chunks"),
            f"{text} must have {parts} numbers, one for each of {SIZE} = {pipeline.size} times model.num_chunks = "
            f"{model.num_chunks}",
        )
    elif min(split) < 1:
        yield Problem((key,), f"{text}: each chunk of a stage needs a layer")
    elif sum(split) != model.num_layers:
        yield Problem(
            (key, "model.num_layers"),
            f"{text} are {sum(split)} layers, and must be model.num_layers = {model.num_layers}",
        )
