"""Tensors between the ranks of a pipeline arrive, in order, whatever else is under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from torch import Tensor

from internlm.core.communication.p2p import PipelineChannels
from internlm.core.communication.pending import Pending
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext

CHANNELS = {(0, 1, "activation"), (1, 0, "activation"), (0, 1, "gradient"), (1, 0, "gradient")}


def connect(world: int) -> tuple[ParallelContext, PipelineChannels]:
    context = ParallelContext.create(ParallelLayout(world_size=world, pipeline=2))
    return context, PipelineChannels.create(context, CHANNELS)


def exchange(world: int) -> list[list[float]]:
    """Every rank posts all its receives, then sends on every channel; returns what came on each, in order."""
    context, channels = connect(world)
    here = context.index("pipeline")
    there = 1 - here
    kinds = ("activation", "gradient")
    incoming = {kind: [channels.receive((there, here, kind), torch.empty(3)) for _ in range(4)] for kind in kinds}
    for kind in reversed(kinds):
        for number in range(4):
            value = context.rank + 10.0 * number + (100.0 if kind == "gradient" else 0.0)
            channels.send((here, there, kind), torch.full((3,), value), max_in_flight=2)
    channels.wait_for_sends()
    arrived = [[float(tensor.wait().mean()) for tensor in incoming[kind]] for kind in kinds]
    context.close()
    return arrived


@pytest.mark.parametrize("world", [2, 4])
def test_each_channel_keeps_its_order(ranks: Callable[[int], RankPool], world: int) -> None:
    """With 4 ranks there are two pipelines, of ranks (0, 2) and (1, 3)."""
    for rank, (activations, gradients) in enumerate(ranks(world).run(exchange, world)):
        peer = (rank + world // 2) % world
        assert activations == [peer + 10.0 * number for number in range(4)]
        assert gradients == [peer + 100.0 + 10.0 * number for number in range(4)]


def use_after_close() -> tuple[str, Any]:
    context, channels = connect(2)
    again = PipelineChannels.create(context, CHANNELS)
    here, there = context.rank, 1 - context.rank
    incoming = again.receive((there, here, "gradient"), torch.empty(2))
    again.send((here, there, "gradient"), torch.ones(2))
    again.wait_for_sends()
    total = float(incoming.wait().sum())
    context.close()
    with pytest.raises(RuntimeError) as error:
        channels.send((here, there, "gradient"), torch.ones(2))
    return str(error.value), total


def test_two_users_of_a_context_and_its_end(ranks: Callable[[int], RankPool]) -> None:
    for message, total in ranks(2).run(use_after_close):
        assert "its ParallelContext was closed" in message
        assert total == 2.0


def lose_the_peer() -> str:
    context, channels = connect(2)
    message = ""
    if context.rank == 1:
        context.close()
    else:
        incoming = channels.receive((1, 0, "gradient"), torch.empty(2))
        try:
            incoming.wait()
        except RuntimeError as error:
            message = str(error)
        context.close()
    return message


def test_a_peer_that_is_gone_is_an_error(ranks: Callable[[int], RankPool]) -> None:
    waiting, _ = ranks(2).run(lose_the_peer)
    assert "closed" in waiting.lower()


def test_a_tensor_that_is_there_needs_no_waiting() -> None:
    tensor: Tensor = torch.ones(2)
    assert Pending(tensor).wait() is tensor
