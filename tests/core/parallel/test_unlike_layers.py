"""Layers that differ: a block with other heads than the model's first, and a parameter of three dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny import global_batch, tiny_config, tiny_engine
from helpers.unlike_layers import build_unlike_layers
from torch import Tensor, nn

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.parallel_linear import ParallelGroupedLinear
from internlm.core.parallel.parallelize import parallelize
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.model.modules.feed_forward import FeedForward
from internlm.model.registry import build_model

LENGTHS = (7, 1, 12, 4)
STEPS, RATE = 2, 1e-2


def train(layout: dict[str, Any], model_type: str) -> tuple[dict[str, list[tuple[Any, Tensor]]], list[float]]:
    """This rank's pieces of all weights after some steps, and the losses."""
    model, context = build_unlike_layers(ParallelLayout(**layout), model_type)
    engine = tiny_engine(context, model=model)
    losses = []
    for step in range(STEPS):
        batch = global_batch(step, 4, context.index("data"), context.size("data"), lengths=LENGTHS)
        losses.append(float(engine.train_step(batch, RATE).loss))
    pieces: dict[str, list[tuple[Any, Tensor]]] = {}
    for parameter in model.parameters():
        spec = shard_spec_of(parameter)
        mine = pieces.setdefault(spec.name, [])
        mine += [(box, parameter.detach()[box.local_slices()].clone()) for box in spec.boxes]
    context.close()
    return pieces, losses


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero": {"world_size": 2},
    "mtp": {"world_size": 2, "tensor": 2, "mode": "mtp"},
    "msp": {"world_size": 2, "tensor": 2, "mode": "msp"},
    "isp": {"world_size": 2, "tensor": 2, "weight": 2, "mode": "isp"},
}


@pytest.mark.parametrize("model_type", ["INTERNLM2", "LLAMA2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unlike_layers_train_as_in_one_process(layout: str, model_type: str, ranks: Any) -> None:
    expected, losses = train({}, model_type)
    assert expected["layers.0.feed_forward.weight"][0][1].shape == (2, 32, 32)
    whole = {name: pieces[0][1] for name, pieces in expected.items()}
    for pieces, rank_losses in ranks(2).run(train, LAYOUTS[layout], model_type):
        assert rank_losses == pytest.approx(losses, rel=1e-6)
        assert pieces.keys() == whole.keys()
        for name, own in pieces.items():
            for box, piece in own:
                # AdamW turns a relative error of a gradient into that share of lr in each step.
                torch.testing.assert_close(piece, whole[name][box.global_slices()], rtol=1e-5, atol=1e-4)


class GateOnly(FeedForward):
    """A block that does without `up`, which is computed together with `gate`."""

    def forward(self, x: Tensor) -> Tensor:
        gate, _ = self.gate_up(x)
        return self.w2(gate)


def unchanged_without_up(layout: dict[str, Any]) -> dict[str, bool]:
    """Parameter -> whether steps with weight decay left it unchanged, of the feed-forward blocks."""
    context = ParallelContext.create(ParallelLayout(**layout))
    with torch.device("meta"):
        model = build_model("LLAMA2", tiny_config(mlp_layer_fusion=False))
        for layer in model.layers.values():  # type: ignore[operator,union-attr]
            layer.feed_forward.__class__ = GateOnly
    parallelize(model, context, seed=7)
    own = {name: p for name, p in model.named_parameters() if ".feed_forward." in name}
    first = {name: p.detach().clone() for name, p in own.items()}
    engine = tiny_engine(context, model=model, weight_decay=0.5)
    for step in range(STEPS):
        batch = global_batch(step, 4, context.index("data"), context.size("data"), lengths=LENGTHS)
        engine.train_step(batch, RATE)
    unchanged = {name: bool(torch.equal(p, first[name])) for name, p in own.items()}
    context.close()
    return unchanged


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_whose_output_is_not_used_is_not_trained(layout: str, ranks: Any) -> None:
    for unchanged in ranks(2).run(unchanged_without_up, LAYOUTS[layout]):
        assert {name: ".w3." in name for name in unchanged} == unchanged


def test_projections_are_grouped_and_names_of_weights_do_not_tell() -> None:
    context = ParallelContext(ParallelLayout(world_size=2, weight=2, mode="isp"), 0, torch.device("cpu"))
    with torch.device("meta"):
        model = build_model("LLAMA2", tiny_config(mlp_layer_fusion=False))
    names = set(model.state_dict())
    parallelize(model, context)
    assert set(model.state_dict()) == names and "layers.0.attention.wq.weight" in names
    layer: Any = model.layers["0"]  # type: ignore[index,operator]
    for grouped, layers in ((layer.attention.qkv, ["wq", "wk", "wv"]), (layer.feed_forward.gate_up, ["w1", "w3"])):
        assert isinstance(grouped, ParallelGroupedLinear)
        own = layer.attention if "wq" in layers else layer.feed_forward
        assert grouped.group.layers == [getattr(own, name) for name in layers]


def test_attention_without_an_inner_attention_is_refused_where_tokens_are_split(ranks: Any) -> None:
    assert (
        ranks(2)
        .run(refusal)[0]
        .startswith("attention 'layers.0.attention' has only a part of each sequence in mode isp")
    )


def refusal() -> str:
    context = ParallelContext.create(ParallelLayout(world_size=2, tensor=2, mode="isp"))
    with torch.device("meta"):
        model = build_model("INTERNLM2", tiny_config())
    for layer in model.layers.values():  # type: ignore[operator,union-attr]
        layer.attention.inner = nn.Identity()
    try:
        parallelize(model, context)
    except ValueError as error:
        return str(error)
    finally:
        context.close()
    return "not refused"
