"""The weights of experts are gathered when their plan says so, beside those of other layers and their plan."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.tiny import micro_batch, tiny_config

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.modes.isp import Isp
from internlm.core.parallel.parallelize import parallelize
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model

EXPERTS = {"num_experts": 4, "top_k": 2, "moe_type": "Dropless"}
GROUPS = [f"layers.{layer}.feed_forward.experts.{name}" for layer in range(3) for name in ("w13", "w2")]

Log = list[tuple[str, str]]


def events(weight: int, options: dict[str, Any], plan: dict[str, Any], checkpoint: float = 0.0) -> Log:
    """What the gathers of a forward and backward pass did."""
    context = ParallelContext.create(ParallelLayout(world_size=2, weight=weight, expert_inner=2, mode="isp"))
    with torch.device("meta"):
        model = build_model("QWEN3MOE", tiny_config(num_layers=3, checkpoint=checkpoint, **EXPERTS))
    parallelize(model, context, options=ParallelOptions(**options, expert_gathering=GatherPlan(**plan)))
    parallel = parallel_of(model)
    assert isinstance(parallel, Isp)
    micro = micro_batch(context.rank, (7, 1, 12, 4))
    assert micro.lengths is not None
    parallel.gathered_weights.log = log = []
    hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))
    log.append(("backward", ""))
    loss = parallel.head_loss(model, hidden, micro.labels, micro.type_ids, linear_cross_entropy)
    loss.loss.loss_sum.backward()
    parallel.end_backward()
    assert not parallel.gathered_weights.num_in_flight
    context.close()
    return log


def of_experts(log: Log) -> tuple[Log, Log]:
    """Events of experts in the forward and in the backward pass."""
    place = log.index(("backward", ""))
    forward, backward = ([entry for entry in part if "experts" in entry[1]] for part in (log[:place], log[place + 1 :]))
    return forward, backward


def order_of(log: Log, event: str) -> list[str]:
    return [name for kind, name in log if kind == event]


def test_without_overlap_they_are_gathered_one_at_a_time(ranks: Any) -> None:
    log = ranks(2).run(events, 2, {"weight_gathering": GatherPlan(overlap=True)}, {})[0]
    forward, backward = of_experts(log)
    assert [kind for kind, _ in forward + backward] == ["launch", "wait", "release"] * (2 * len(GROUPS))
    assert (order_of(forward, "wait"), order_of(backward, "wait")) == (GROUPS, GROUPS[::-1])


@pytest.mark.parametrize("weight", [1, 2])
@pytest.mark.parametrize("plan", [("module", "wo"), *(("layer", name) for name in ("wqkv", "attn", "wo", "w1"))])
def test_with_overlap_they_are_gathered_ahead(plan: tuple[str, str], weight: int, ranks: Any) -> None:
    """Each once, and before what is computed in front of them; those of the next layer at the planned time."""
    log = ranks(2).run(events, weight, {}, {"overlap": True, "ahead": plan[0], "layer_before": plan[1]})[0]
    forward, backward = of_experts(log)
    for part, groups in ((forward, GROUPS), (backward, GROUPS[::-1])):
        assert order_of(part, "wait") == groups
        assert sorted(order_of(part, "launch")) == sorted(groups)
    for earlier, group in itertools.pairwise(GROUPS):
        assert forward.index(("launch", group)) < forward.index(("release", earlier)), group
    if plan[0] == "module":
        for earlier, group in itertools.pairwise(GROUPS[::-1]):
            assert backward.index(("launch", group)) < backward.index(("release", earlier)), group
        return
    if weight == 2:
        following = log.index(("launch", GROUPS[2]))
        assert (following > log.index(("release", "layers.0.attention.wo"))) == (plan[1] == "w1")
        assert (following > log.index(("release", "layers.0.attention.wq"))) == (plan[1] != "wqkv")
        everything = log[log.index(("backward", "")) :]
        for layer in (0, 1):
            launched = everything.index(("launch", GROUPS[2 * layer + 1]))
            assert launched < everything.index(("wait", f"layers.{layer + 1}.attention.wo"))


def test_recomputation_gathers_them_again_in_one_order_on_all_ranks(ranks: Any) -> None:
    options = {"overlap": True, "memory_pool": True, "release_gradients_early": False}
    log, other = ranks(2).run(events, 2, {"weight_gathering": GatherPlan(overlap=True)}, options, 1.0)
    assert log == other
    _, backward = of_experts(log)
    assert all(order_of(backward, "wait").count(group) == 2 for group in GROUPS)
