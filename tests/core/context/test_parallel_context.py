"""A context and its process groups: nothing of them is left when it is closed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from helpers.tiny import global_batch, tiny_engine

from internlm.core.context.layout import ParallelLayout
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
    engine.train_step(global_batch(0, 2, context.rank, context.world_size), 1e-3)
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


def timeouts_and_counts() -> tuple[set[float], list[int]]:
    """The time limits of all groups, the backends' included; and how the count of one group grows."""
    layout = ParallelLayout(world_size=2, pipeline=2)
    context = ParallelContext.create(layout, timeout_seconds=123.0)
    context.make_named_group("alone", (0, 1))
    groups: list[Any] = [context.group("pipeline"), context.named_group("alone")]
    limits = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    name = groups[1].group_name
    counts = [context.num_collectives()[name]]
    for _ in range(2):
        dist.all_reduce(torch.zeros(()), group=groups[1])
        counts.append(context.num_collectives()[name])
    context.close()
    return limits, counts


def test_every_group_has_the_timeout_and_counts_its_collectives(ranks: Callable[[int], RankPool]) -> None:
    (limits, counts), (_, others) = ranks(2).run(timeouts_and_counts)
    assert limits == {123.0}
    assert counts == others == [counts[0], counts[0] + 1, counts[0] + 2]
