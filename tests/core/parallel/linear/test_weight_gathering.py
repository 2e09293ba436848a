"""isp's gathers: launched before the compute they hide behind, and as little memory as promised."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from helpers.tiny import micro_batch, tiny_config

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.parallel_linear import LinearGroup
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.modes.isp import Isp
from internlm.core.parallel.parallelize import parallelize
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model

LAYERS = 3
GROUPS = [
    f"layers.{layer}.{name}"
    for layer in range(LAYERS)
    for name in ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2")
]


def events(options: dict[str, Any], checkpoint: float = 0.0, passes: int = 1) -> tuple[list[tuple[str, str]], int]:
    """What the weight gathers of a forward and backward pass did, and how many buffers were made."""
    context = ParallelContext.create(ParallelLayout(world_size=2, weight=2, mode="isp"))
    with torch.device("meta"):
        model = build_model("INTERNLM2", tiny_config(num_layers=LAYERS, checkpoint=checkpoint))
    parallelize(model, context, options=ParallelOptions(**options))
    parallel = parallel_of(model)
    assert isinstance(parallel, Isp)
    micro = micro_batch(context.rank, (7, 1, 12, 4))
    assert micro.lengths is not None
    for _ in range(passes):
        parallel.gathered_weights.log = log = []
        hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))
        log.append(("backward", ""))
        loss = parallel.head_loss(model, hidden, micro.labels, micro.type_ids, partial(linear_cross_entropy))
        loss.loss.loss_sum.backward()
        parallel.end_backward()
        assert not parallel.gathered_weights.num_in_flight
    context.close()
    return log, parallel.gathered_weights.num_buffers_made


def order_of(log: list[tuple[str, str]], event: str) -> list[str]:
    return [name for kind, name in log if kind == event]


def split_at_backward(log: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    place = log.index(("backward", ""))
    return log[:place], log[place + 1 :]


def test_without_overlap_a_gather_is_waited_for_at_once(ranks: Any) -> None:
    log, _ = ranks(2).run(events, {})[0]
    steps = [entry for entry in log if entry[0] != "backward"]
    assert [kind for kind, _ in steps] == ["launch", "wait", "release"] * (2 * len(GROUPS))


@pytest.mark.parametrize("ahead", ["module", "layer"])
@pytest.mark.parametrize("before", ["wqkv", "attn", "wo", "w1"])
def test_with_overlap_gathers_are_launched_before_the_compute_they_hide_behind(
    ahead: str, before: str, ranks: Any
) -> None:
    options = {"weight_gathering": GatherPlan(overlap=True, ahead=ahead, layer_before=before)}
    log, _ = ranks(2).run(events, options)[0]
    for part, groups in zip(split_at_backward(log), (GROUPS, GROUPS[::-1]), strict=True):
        assert order_of(part, "wait") == groups
        # Each is launched once, and (but the very first) before the layers in front of it have computed: a group's
        # layers compute between its wait and its release.
        assert sorted(order_of(part, "launch")) == sorted(groups)
        for earlier, group in itertools.pairwise(groups):
            assert part.index(("launch", group)) < part.index(("release", earlier)), group
    forward, _ = split_at_backward(log)
    if ahead == "layer":
        trigger = {"wqkv": "attention.wqkv", "wo": "attention.wo", "w1": "feed_forward.w1", "attn": "attention.wo"}[
            before
        ]
        first_of_next = forward.index(("launch", "layers.1.attention.wqkv"))
        assert first_of_next < forward.index(("release", f"layers.0.{trigger}"))
        if before in ("wo", "w1"):
            assert first_of_next > forward.index(("release", "layers.0.attention.wqkv"))


@pytest.mark.parametrize("ahead", ["module", "layer"])
def test_recomputed_layers_gather_for_recomputation_and_for_backward(ahead: str, ranks: Any) -> None:
    options = {"weight_gathering": GatherPlan(overlap=True, ahead=ahead, memory_pool=True)}
    (log, _), (other, _) = ranks(2).run(events, options, 1.0)
    assert log == other, "every rank must launch the same collectives in the same order"
    _, backward = split_at_backward(log)
    for group in GROUPS:
        assert order_of(backward, "wait").count(group) == 2


def test_a_memory_pool_makes_buffers_once(ranks: Any) -> None:
    _, once = ranks(2).run(events, {"weight_gathering": GatherPlan(overlap=True, memory_pool=True)}, 0.0, 1)[0]
    _, thrice = ranks(2).run(events, {"weight_gathering": GatherPlan(overlap=True, memory_pool=True)}, 0.0, 3)[0]
    _, without = ranks(2).run(events, {"weight_gathering": GatherPlan(overlap=True)}, 0.0, 1)[0]
    assert once == thrice
    # Two layers of five weights (wqkv, wo, w1, w3, w2) are alive at most, where each use would make one.
    assert once <= 2 * 5
    assert without == 2 * 5 * LAYERS


def test_every_group_of_layers_is_registered_in_order() -> None:
    context = ParallelContext(ParallelLayout(world_size=2, weight=2, mode="isp"), 0, torch.device("cpu"))
    with torch.device("meta"):
        model = build_model("LLAMA2", tiny_config(mlp_layer_fusion=False))
    parallelize(model, context)
    groups: list[LinearGroup] = parallel_of(model).gathered_weights.groups  # type: ignore[attr-defined]
    names = [group.name for group in groups]
    assert names[:4] == [
        "layers.0.attention.wq",
        "layers.0.attention.wo",
        "layers.0.feed_forward.w1",
        "layers.0.feed_forward.w2",
    ]
