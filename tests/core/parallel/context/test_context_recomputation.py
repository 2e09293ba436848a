"""Recomputation on context ranks: bit-equal, and keys and values travel as often as without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from helpers.tiny import micro_batch, tiny_model
from torch import Tensor

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.model_parallel import parallel_of
from internlm.model.ops.cross_entropy import linear_cross_entropy


def trained(changes: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """This rank's gradients of one pass, and the number of times that it started to send or receive."""
    context = ParallelContext.create(ParallelLayout(world_size=2, context=2))
    model = tiny_model(context, **changes)
    parallel = parallel_of(model)
    sample = parallel.split_sample(micro_batch(0, (7, 1, 12, 4)))
    micro = sample.micro_batch
    with patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as started:
        hidden = model(micro.input_ids, micro.position_ids, sample.documents(micro))
        loss = parallel.head_loss(model, hidden, micro.labels, micro.type_ids, linear_cross_entropy).loss.loss_sum
        loss.backward()
    parallel.end_backward()
    context.close()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, started.call_count


@pytest.mark.parametrize("policy", ["nothing", "attention", "matmuls"])
def test_keys_travel_once_in_forward_and_once_in_backward(policy: str, ranks: Callable[[int], RankPool]) -> None:
    """In each of two layers one message of keys, one more in backward, and one of gradients."""
    recomputed = {"checkpoint": 1.0, "checkpoint_save_policy": policy}
    for (expected, plain), (found, started) in zip(
        ranks(2).run(trained, {}), ranks(2).run(trained, recomputed), strict=True
    ):
        assert plain == started == 2 * 3
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
