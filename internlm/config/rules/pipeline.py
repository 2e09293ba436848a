"""Rules on pipelines: chunks and micro-batches of each schedule, and the layers of each stage."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from internlm.config.problem import Problem
from internlm.config.rules.layout_problems import layout_problems
from internlm.config.rules.run import parse_ramp
from internlm.config.schema import Config
from internlm.utils.layout_checks import check_layer_split, check_schedule

SIZE = "parallel.pipeline.size"


def schedule(config: Config, world_size: int) -> Iterator[Problem]:
    """The schedule must support the numbers of chunks and micro-batches."""
    pipeline, data = config.parallel.pipeline, config.data
    ramp = f"data.rampup_batch_size = {data.rampup_batch_size!r} gives steps with data.micro_num"
    steps = [(data.micro_num, "data.micro_num"), *((number, ramp) for number in _micro_nums_of_ramp(config))]
    for micro_num, name in steps:
        names = {
            "mode": "parallel.pipeline.mode",
            "num_ranks": SIZE,
            "num_chunks": "model.num_chunks",
            "num_micro_batches": name,
        }
        check = partial(check_schedule, pipeline.mode, pipeline.size, config.model.num_chunks, micro_num)
        found = list(layout_problems(check, names))
        yield from found
        if found:
            return


def _micro_nums_of_ramp(config: Config) -> list[int]:
    """Micro-batches of the steps before the ramp reaches data.micro_num, in order."""
    ramp = parse_ramp(config.data.rampup_batch_size)
    if ramp is None:
        return []
    start, increment, steps = ramp
    reached = -(-config.data.total_steps // steps)
    return list(range(start, config.data.micro_num, increment))[:reached]


def layers(config: Config, world_size: int) -> Iterator[Problem]:
    """Every chunk of every stage must have a layer; a given split must cover all layers."""
    pipeline, model = config.parallel.pipeline, config.model
    if pipeline.size == 1:
        return
    split = None if isinstance(pipeline.layer_split, str) else pipeline.layer_split
    check = partial(check_layer_split, model.num_layers, pipeline.size * model.num_chunks, split)
    names = {
        "num_stages": f"{SIZE} times model.num_chunks",
        "num_layers": "model.num_layers",
        "sizes": "parallel.pipeline.layer_split",
    }
    yield from layout_problems(check, names)
