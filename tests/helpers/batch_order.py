"""The batches of a run whose ranks, workers and interruptions vary."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from internlm.data.loaders.train_loader import TrainLoader, build_train_loader
from internlm.data.sources.sample_stream import SampleStream

SAMPLES = 8
"""Samples of a step, over all ranks."""


def batches_of(
    open_stream: Callable[[], SampleStream],
    steps: int,
    *,
    sizes: Sequence[int] = (1,),
    workers: Sequence[int] = (0,),
    stops: Sequence[int] = (),
) -> list[list[Any]]:
    """Everything that a step trains on, for each step.

    Args:
        open_stream: called for each rank at each start.
        steps: number of steps.
        sizes: number of data ranks at each start, repeated; each divides SAMPLES.
        workers: number of worker processes at each start, repeated.
        stops: steps before which all ranks stop, and start again from the merged state as a checkpoint stores it.
    """
    result: list[list[Any]] = []
    state = None
    for run, (first, last) in enumerate(pairwise((0, *stops, steps))):
        size = sizes[run % len(sizes)]
        loaders = [
            build_train_loader(
                open_stream(),
                micro_num=SAMPLES // size,
                data_rank=rank,
                data_size=size,
                num_workers=workers[run % len(workers)],
            )
            for rank in range(size)
        ]
        try:
            for loader in loaders:
                if state is not None:
                    loader.load_state_dict(state)
            for _ in range(first, last):
                result.append([content for loader in loaders for content in _contents(loader)])
            merged = loaders[0].merge_states([loader.state_dict() for loader in loaders])
            state = json.loads(json.dumps(merged))
        finally:
            for loader in loaders:
                loader.close()
    return result


def _contents(loader: TrainLoader) -> list[Any]:
    return [
        (micro.input_ids.tolist(), micro.labels.tolist(), micro.type_ids.tolist(), micro.lengths)
        for micro in next(loader).micro_batches
    ]
