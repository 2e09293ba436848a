"""Bytes that ranks send for split experts: calls of torch.distributed against the formulas of doc/moe.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import RankPool
from torch import Tensor

from internlm.core.communication import collectives
from internlm.verify.batches import local_batch
from internlm.verify.case import Case, Combination
from internlm.verify.run import CaseRun, start_case

MODEL = "model:family=QWEN3MOE,experts=6,top_k=3,layers=2,dtype=float64"


def sent_in_a_step(case: Case, axis: str, view: str) -> int:
    """Bytes that this rank sends over an axis, in gathers and reduce-scatters of a step."""
    context = start_case(case)
    run = CaseRun(case, context)
    sent = 0

    def counting(real: Callable[..., Any], *, is_gather: bool) -> Callable[..., Any]:
        def call(output: Tensor, source: Tensor, group: Any, **kwargs: Any) -> Any:
            nonlocal sent
            if group is context.group(axis, view):
                ranks = dist.get_world_size(group)
                sent += (output if is_gather else source).nbytes * (ranks - 1) // ranks
            return real(output, source, group=group, **kwargs)

        return call

    engine = run.trainer.engine
    batch = local_batch(case, 0, context.index("data"), context.size("data"))
    with (
        patch.object(collectives, "_all_gather", counting(collectives._all_gather, is_gather=True)),
        patch.object(collectives, "_reduce_scatter", counting(collectives._reduce_scatter, is_gather=False)),
    ):
        engine.forward_backward(batch)
    context.close()
    return sent


@pytest.mark.parametrize(("expert", "checkpoint"), [(1, 0), (2, 0), (1, 1)])
def test_gathered_weights(expert: int, checkpoint: int, ranks: Callable[[int], RankPool]) -> None:
    """`3 e f h (2b + g) (n-1)/n`, and a third gather for recomputation."""
    case = Combination.parse(f"ranks=4 layout:mode=isp,expert={expert},expert_weight=2 {MODEL},checkpoint={checkpoint}")
    config = case.case().config
    size = torch.float64.itemsize
    weights = 3 * config.model.num_experts // expert * config.model.hidden_size * config.model.expert_size
    layer = weights * (2 + checkpoint + 1) * size // 2
    expected = layer * config.model.num_layers * config.data.micro_num
    assert ranks(4).run(sent_in_a_step, case.case(), "expert_weight", "expert") == [expected] * 4


def test_tensor_ranks(ranks: Callable[[int], RankPool]) -> None:
    """`4 N h b (n-1)/n + 16 N k (n-1)/n` for experts, beside what attention and the ends of the model send."""
    layout = "ranks=4 layout:tensor=2,mode=msp,expert=1"
    whole, split = (Combination.parse(f"{layout}{more} {MODEL}").case() for more in ("", ",expert_tensor"))
    config = split.config
    tokens, h, k = config.data.seq_len * config.data.micro_bsz, config.model.hidden_size, config.model.top_k
    # Ids are int64; weights, and in backward their gradients, float64 here where they are fp32 otherwise.
    layer = (4 * tokens * h * 8 + tokens * k * (8 + 2 * 8)) // 2
    expected = layer * config.model.num_layers * config.data.micro_num
    pool = ranks(4)
    found = [pool.run(sent_in_a_step, case, "tensor", "activation") for case in (split, whole)]
    assert [one - other for one, other in zip(*found, strict=True)] == [expected] * 4
