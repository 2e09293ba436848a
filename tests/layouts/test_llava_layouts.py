"""A model that reads pictures trains in every layout as in one process, also where ranks have no picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.llava import llava_config, picture_batch
from helpers.ranks import RankPool
from torch import nn

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.parallel.fsdp import apply_fsdp, local_tensor
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.core.parallel.pipeline_stages import build_stages, split_layers
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.core.scheduler.schedules import make_schedule
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.parameter_groups import ParameterGroup, freeze_parameters

FROZEN = (ParameterGroup("vision_tower.*", freeze=True),)
PROJECTOR_ONLY = (ParameterGroup("*", freeze=True), ParameterGroup("vision_proj.*"))

Numbers = tuple[list[tuple[float, float]], dict[str, torch.Tensor]]


def make_model(**keys: Any) -> nn.Module:
    with torch.device("meta"):
        return build_model("LLAVA", llava_config(**keys))


def train(layout: dict[str, Any], options: dict[str, Any]) -> Numbers:
    """Losses and gradient norms of three steps, the second without pictures, and the pieces of the weights after."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    settings = {"fsdp": False, "groups": (), "model": {}, "pictures": (True, False, True), **options}
    context = ParallelContext.create(ParallelLayout(**{"world_size": world, **layout}))
    ranks = context.size("pipeline")
    schedule = partial(make_schedule, "1F1B", ranks)
    chunks = build_stages(
        partial(make_model, **settings["model"]),
        context,
        schedule(4).placement,
        split_layers(2, ranks),
        seed=7,
        options=ParallelOptions(defer_weights=settings["fsdp"]),
    )
    freeze_parameters(chunks, settings["groups"])
    if settings["fsdp"]:
        apply_fsdp(chunks[0], context)
    optimizer = HybridZeroOptimizer(chunks, context, groups=settings["groups"])
    engine = Engine(chunks, optimizer, context, partial(linear_cross_entropy, with_accuracy=True), schedule=schedule)
    found = []
    for step, has_pictures in enumerate(settings["pictures"]):
        batch = picture_batch(step, context.index("data"), context.size("data"), has_pictures=has_pictures)
        result = engine.train_step(batch, 1e-2)
        found.append((float(result.loss), float(result.grad_norm)))
    weights = {}
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            spec = shard_spec_of(parameter)
            for box in spec.boxes:
                weights[f"{spec.name}@{box.global_offset}"] = (box, local_tensor(parameter)[box.local_slices()].clone())
    context.close()
    return found, weights


def assert_equal(found: list[Numbers], expected: Numbers) -> None:
    """Every rank has the losses and norms of one process, and its part of the weights."""
    whole = {name.partition("@")[0]: values for name, (_, values) in expected[1].items()}
    seen = set()
    for numbers, weights in found:
        torch.testing.assert_close(torch.tensor(numbers), torch.tensor(expected[0]), rtol=2e-5, atol=0)
        for key, (box, values) in weights.items():
            name = key.partition("@")[0]
            seen.add(name)
            # Adam divides by the root of squared gradients: where these are rounding, the sign of a step is arbitrary.
            torch.testing.assert_close(values, whole[name][box.global_slices()], rtol=1e-3, atol=2e-4, msg=key)
    assert seen == whole.keys()


LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "zero": {"zero": 2},
    "mtp": {"tensor": 2, "mode": "mtp"},
    "msp": {"tensor": 2, "mode": "msp"},
    "fsp": {"tensor": 2, "mode": "fsp"},
    "isp": {"tensor": 2, "weight": 2, "mode": "isp"},
    "isp_weight": {"weight": 2, "mode": "isp"},
    "context": {"context": 2},
    "pipeline": {"pipeline": 2},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_as_one_process(name: str, ranks: Callable[[int], RankPool]) -> None:
    assert_equal(ranks(2).run(train, LAYOUTS[name], {}), train({}, {}))


VARIANTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "fsdp": (2, {}, {"fsdp": True}),
    "fsdp_frozen_tower": (2, {}, {"fsdp": True, "groups": FROZEN}),
    "fsdp_projector_only": (2, {}, {"fsdp": True, "groups": PROJECTOR_ONLY, "model": {"checkpoint": 1.0}}),
    "zero_projector_only": (2, {"zero": 2}, {"groups": PROJECTOR_ONLY, "model": {"checkpoint": 1.0}}),
    "msp_frozen_tower": (2, {"tensor": 2, "mode": "msp"}, {"groups": FROZEN}),
    "pipeline_projector_only": (2, {"pipeline": 2}, {"groups": PROJECTOR_ONLY}),
    "isp_projector_only": (2, {"tensor": 2, "weight": 2, "mode": "isp"}, {"groups": PROJECTOR_ONLY}),
    "mtp_tied_head": (2, {"tensor": 2, "mode": "mtp"}, {"model": {"tie_word_embeddings": True}}),
    "mtp_context": (4, {"tensor": 2, "context": 2, "mode": "mtp"}, {}),
    "msp_context": (4, {"tensor": 2, "context": 2, "mode": "msp"}, {}),
    "isp_context_frozen": (4, {"tensor": 2, "context": 2, "mode": "isp", "head_first": False}, {"groups": FROZEN}),
    "pipeline_data": (4, {"pipeline": 2, "zero": 2}, {"groups": FROZEN}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_as_one_process(name: str, ranks: Callable[[int], RankPool]) -> None:
    world, layout, options = VARIANTS[name]
    expected = train({}, {**options, "fsdp": False})
    assert_equal(ranks(world).run(train, layout, options), expected)
    if options.get("groups") == FROZEN:
        start = train({}, {**options, "fsdp": False, "pictures": ()})[1]
        for name, (_, values) in expected[1].items():
            is_equal = torch.equal(values, start[name][1])
            assert is_equal == name.startswith("vision_tower."), name
