"""Further values of each token reach the model, cut and moved like the tokens, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.tiny import global_batch, tiny_config
from torch import Tensor, nn

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.parallel.pipeline_stages import build_stages, split_layers
from internlm.core.scheduler.schedules import make_schedule
from internlm.data.batch import Batch
from internlm.model.architecture import Architecture, FamilyDefaults
from internlm.model.decoder import Decoder
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer


class GainDecoder(Decoder):
    """Scales the embedding of each token, and the output of the last layer, by a value of the token."""

    gain: Tensor

    def forward(  # type: ignore[override]
        self, inputs: Tensor, position_ids: Tensor, varlen: Any = None, cache: Any = None, *, extra: dict[str, Tensor]
    ) -> Tensor:
        self.gain = extra["gain"].unsqueeze(-1)
        return super().forward(inputs, position_ids, varlen, cache)

    def embed(self, input_ids: Tensor) -> Tensor:
        return super().embed(input_ids) * self.gain

    def finish(self, hidden: Tensor) -> Tensor:
        return super().finish(hidden) * self.gain


def make_model(cls: type[Decoder] = GainDecoder) -> nn.Module:
    with torch.device("meta"):
        return cls(Architecture.resolve(tiny_config(num_layers=2), FamilyDefaults(), norm_dtype=None))


def with_gain(batch: Batch) -> Batch:
    micros = [
        replace(micro, extra={"gain": 1 + 0.1 * torch.sin(3.0 * torch.arange(micro.input_ids.numel()))[None]})
        for micro in batch.micro_batches
    ]
    return replace(batch, micro_batches=micros)


def new_engine(context: ParallelContext, cls: type[Decoder] = GainDecoder) -> Engine:
    ranks = context.size("pipeline")
    schedule = partial(make_schedule, "1F1B", ranks)
    layers = split_layers(2, ranks)
    chunks = build_stages(partial(make_model, cls), context, schedule(4).placement, layers, seed=7)
    loss = partial(linear_cross_entropy, with_accuracy=True)
    return Engine(chunks, HybridZeroOptimizer(chunks, context), context, loss, schedule=schedule)


def numbers(layout: dict[str, Any]) -> list[tuple[float, float]]:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    context = ParallelContext.create(ParallelLayout(**{"world_size": world, **layout}))
    engine = new_engine(context)
    data, size = context.index("data"), context.size("data")
    found = []
    for step in range(2):
        result = engine.train_step(with_gain(global_batch(step, 4, data, size)), 1e-2)
        found.append((float(result.loss), float(result.grad_norm)))
    context.close()
    return found


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor": 2, "mode": "mtp"},
        {"tensor": 2, "mode": "msp"},
        {"tensor": 2, "mode": "fsp"},
        {"tensor": 2, "weight": 2, "mode": "isp"},
        {"pipeline": 2},
    ],
)
def test_every_layout_equals_one_process(layout: dict[str, Any], ranks: Callable[[int], RankPool]) -> None:
    expected = torch.tensor(numbers({}))
    for found in ranks(2).run(numbers, layout):
        torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=0)


def test_the_values_matter() -> None:
    batch = global_batch(0)
    micros = [replace(m, extra={"gain": torch.full(m.input_ids.shape, 2.0)}) for m in batch.micro_batches]
    losses = [
        float(new_engine(ParallelContext.create()).train_step(each, 1e-2).loss)
        for each in (with_gain(batch), replace(batch, micro_batches=micros))
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_model_that_takes_none_is_named() -> None:
    engine = new_engine(ParallelContext.create(), Decoder)
    with pytest.raises(ValueError, match=r"extra inputs \(gain\), which the model does not take: give Decoder.forward"):
        engine.train_step(with_gain(global_batch(0)), 1e-2)


def test_a_tensor_of_another_shape_is_named() -> None:
    micro = global_batch(0).micro_batches[0]
    with pytest.raises(ValueError, match=r"extra\['gain'\] is \[3\], and input_ids are \[1, 20\]"):
        replace(micro, extra={"gain": torch.ones(3)})
