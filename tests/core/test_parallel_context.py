"""A context and its process groups: nothing of them is left when it is closed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from helpers.tiny import global_batch, tiny_engine

from internlm.core.context.parallel_context import ParallelContext


def communication_threads() -> int:
    """Threads of gloo process groups in this process."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name == "pt_gloo_runloop" for name in names)


def train_and_close() -> list[int]:
    """The number of threads before there is a context, while an engine trains in it, and after it is closed."""
    dist.all_reduce(torch.zeros(()))  # the default group, which is not the context's, starts its threads when used
    before = communication_threads()
    context = ParallelContext.create()
    engine = tiny_engine(context)
    engine.train_step(global_batch(0, 2, context.rank, context.world_size), lr=1e-3)
    during = communication_threads()
    context.close()
    after = communication_threads()
    with pytest.raises(RuntimeError, match="its ParallelContext was closed"):
        engine.optimizer.gather_parameters()  # type: ignore[attr-defined]
    return [before, during, after]


def test_closing_ends_the_threads_of_the_groups(ranks: Callable[[int], RankPool]) -> None:
    # A thread that is left when the interpreter ends may abort the process, with the engine still alive or not.
    for before, during, after in ranks(2).run(train_and_close):
        assert during > before
        assert after == before
