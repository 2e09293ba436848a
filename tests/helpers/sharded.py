"""A model of hand-made ShardSpecs: every way in which a parameter can lie on ranks, without any parallel mode.

Two stages (of a pipeline, if there is one) hold a fused weight, a column-split weight and a norm each; a tied embedding
with a padded vocabulary is on both ends. Weights and gradients are functions of the global name alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import local_tensor, reshard
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.core.parallel.shard_spec import Box, ShardSpec, attach_shard_spec, shard_spec_of
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer

GLOBAL_SHAPES = {
    "embedding": (5, 4),
    **{
        f"layers.{n}.{name}": shape
        for n in (0, 1)
        for name, shape in (("wqkv", (6, 4)), ("wo", (3, 8)), ("norm", (7,)))
    },
}

LR, DECAY, CLIP, STEPS, BACKWARDS = 1e-2, 0.1, 1.0, 3, 2
"""What `train_whole` does: steps of so many backward passes each."""

# A gradient is a sum of up to 8 shares with entries up to about 6, each rounded to fp32: 8 * 6 * 2**-24 = 3e-6. No
# entry of the whole gradients is below 4e-3, and AdamW turns a relative error into that share of lr, in each of the
# steps: 3 * 1e-2 * 3e-6 / 4e-3 = 2.3e-5.
GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 3e-6, 3e-5


def normal(key: str, shape: tuple[int, ...]) -> Tensor:
    """Random numbers that depend on `key` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(crc32(key.encode())))


class ShardedModel(nn.Module):
    """This rank's parts. Under isp the weights lie along "weight", else along "tensor", which has 2 ranks or 1."""

    def __init__(self, context: ParallelContext, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.context = context
        self.parts = nn.ParameterList()
        for spec in self._specs():
            local = torch.zeros(spec.local_shape, dtype=dtype)
            whole = normal(spec.name, spec.global_shape)
            for box in spec.boxes:
                local[box.local_slices()] = whole[box.global_slices()].to(dtype)
            parameter = nn.Parameter(local)
            attach_shard_spec(parameter, spec)
            self.parts.append(parameter)

    def _specs(self) -> Iterator[ShardSpec]:
        layout = self.context.layout
        axis, data = ("weight", "weight_data") if layout.is_isp else ("tensor", "data")
        size, index = self.context.size(axis, "weight"), self.context.index(axis, "weight")
        stages, stage = layout.pipeline, self.context.index("pipeline")

        def spec(
            name: str, local: tuple[int, ...], box: Box, over: Sequence[str] = (), partial: Sequence[str] = ()
        ) -> ShardSpec:
            return ShardSpec(name, GLOBAL_SHAPES[name], local, (box,), "weight", data, tuple(over), tuple(partial))

        rows = -(-5 // size)
        valid = min(rows, 5 - index * rows)
        ends = ("pipeline_ends",) if stages > 1 else ()
        if stage in (0, stages - 1):
            box = Box((index * rows, 0), (0, 0), (valid, 4))
            yield spec("embedding", (rows, 4), box, over=(axis,), partial=ends)
        for layer in (0, 1):
            if layer % stages != stage:
                continue
            q, name = 4 // size, f"layers.{layer}.wqkv"
            yield spec(name, (q, 4), Box((index * q, 0), (0, 0), (q, 4)), over=(axis,))
            # One key-value head for all tensor ranks: each computes the gradient from its own query heads.
            copies = "kv_replica" if layout.kv_replicas > 1 else axis
            yield spec(name, (2, 4), Box((4, 0), (0, 0), (2, 4)), partial=(copies,))
            columns = 8 // size
            box = Box((0, index * columns), (0, 0), (3, columns))
            yield spec(f"layers.{layer}.wo", (3, columns), box, over=(axis,))
            yield spec(f"layers.{layer}.norm", (7,), Box((0,), (0,), (7,)), partial=(axis,))

    def deliver(self, step: int, dtype: torch.dtype = torch.float32) -> None:
        """One gradient for every parameter: this rank's share of the sum, and nonsense in the padding."""
        for parameter in self.parts:
            spec = shard_spec_of(parameter)
            deliver_gradient(parameter, self.share_of(spec, step).to(dtype))

    def share_of(self, spec: ShardSpec, step: int) -> Tensor:
        """This rank's gradient of a parameter, `[local_shape]` in fp32."""
        whole = share_of_gradient(spec.name, step, *self._place(spec))
        local = torch.full(spec.local_shape, 1e3)
        for box in spec.boxes:
            local[box.local_slices()] = whole[box.global_slices()]
        return local

    def run_backward(self, step: int) -> None:
        """Backward pass `step`: `deliver` stands for it."""
        self.deliver(step)

    def _place(self, spec: ShardSpec) -> tuple[int, int]:
        """(this rank's number, their number) among those whose gradients of a parameter are summed."""
        view = self.context.view(spec.view)
        number, count = 0, 1
        for axis in (spec.data_axis, *spec.partial_over):
            group = view.group(axis, self.context.rank)
            number, count = number * len(group) + group.index(self.context.rank), count * len(group)
        return number, count


def share_of_gradient(name: str, step: int, number: int, count: int) -> Tensor:
    """One of `count` tensors that sum to `gradient(name, step)`, of very different sizes; fp32."""
    share = 0.0 if count == 1 else normal(f"{name}/{step}/{number}", GLOBAL_SHAPES[name])
    following = 0.0 if count == 1 else normal(f"{name}/{step}/{(number + 1) % count}", GLOBAL_SHAPES[name])
    return gradient(name, step) / count + share - following


def gradient(name: str, step: int) -> Tensor:
    """The whole gradient of a parameter in a step."""
    return normal(f"{name}/{step}", GLOBAL_SHAPES[name])


def train_whole() -> tuple[list[float], list[dict[str, Tensor]], dict[str, Tensor]]:
    """torch.optim.AdamW on the whole tensors with the whole gradients: norms and clipped gradients by step, weights."""
    weights = {name: nn.Parameter(normal(name, shape)) for name, shape in GLOBAL_SHAPES.items()}
    groups = [
        {"params": [w for w in weights.values() if w.ndim > 1], "weight_decay": DECAY},
        {"params": [w for w in weights.values() if w.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
    norms, gradients = [], []
    for step in range(STEPS):
        for name, weight in weights.items():
            weight.grad = sum(gradient(name, BACKWARDS * step + n) for n in range(BACKWARDS))  # type: ignore[assignment]
        norms.append(float(nn.utils.clip_grad_norm_(weights.values(), CLIP)))
        gradients.append({name: weight.grad.clone() for name, weight in weights.items()})  # type: ignore[union-attr]
        adamw.step()
    return norms, gradients, {name: weight.detach() for name, weight in weights.items()}


def assemble(parts: Iterable[Iterable[tuple[str, list[tuple[Box, Tensor]]]]]) -> dict[str, Tensor]:
    """Global tensors from the pieces of all ranks. Fails where they leave a hole, or differ where they overlap."""
    result: dict[str, Tensor] = {}
    for on_rank in parts:
        for name, pieces in on_rank:
            whole = result.setdefault(name, torch.full(GLOBAL_SHAPES[name.split("/")[-1]], torch.nan))
            for box, piece in pieces:
                before = whole[box.global_slices()]
                assert (before.isnan() | (before == piece)).all(), name
                whole[box.global_slices()] = piece
    for name, whole in result.items():
        assert not whole.isnan().any(), name
    return result


def model_pieces(model: ShardedModel) -> list[tuple[str, list[tuple[Box, Tensor]]]]:
    """Copies of the boxes of every parameter."""
    specs = {parameter: shard_spec_of(parameter) for parameter in model.parts}
    return [
        (spec.name, [(box, local_tensor(parameter)[box.local_slices()].clone()) for box in spec.boxes])
        for parameter, spec in specs.items()
    ]


def padding_of(model: ShardedModel) -> list[Tensor]:
    """The parts of parameters that no box covers."""
    return [
        local_tensor(parameter)[tuple(slice(a, a + n) for a, n in zip(*rectangle, strict=True))].clone()
        for parameter in model.parts
        for rectangle in shard_spec_of(parameter).padding()
    ]


def new_optimizer(model: ShardedModel, bucket_size: int = 40) -> HybridZeroOptimizer:
    """The optimizer of `train_whole`, for shards."""
    return HybridZeroOptimizer(
        model, model.context, weight_decay=DECAY, clip_grad_norm=CLIP, reduce_bucket_size=bucket_size
    )


def take_step(model: ShardedModel, optimizer: HybridZeroOptimizer, step: int) -> float:
    """Step `step` of `train_whole`; its norm."""
    optimizer.begin_step(BACKWARDS)
    for backward in range(BACKWARDS):
        model.run_backward(BACKWARDS * step + backward)
    return float(optimizer.step(LR).grad_norm)


def train_shards(model: ShardedModel, optimizer: HybridZeroOptimizer) -> dict[str, Any]:
    """What `train_whole` does, on this rank's shards; ends the context."""
    norms, gradients = [], []
    for step in range(STEPS):
        norms.append(take_step(model, optimizer, step))
        gradients.append([(n, [(b, p.clone()) for b, p in pieces]) for n, _, pieces in optimizer.sharded_gradients()])
    state = state_pieces(optimizer)
    reshard(model)
    weights, padding = model_pieces(model), padding_of(model)
    model.context.close()
    return {"norms": norms, "gradients": gradients, "weights": weights, "state": state, "padding": padding}


def state_pieces(optimizer: HybridZeroOptimizer) -> list[tuple[str, list[tuple[Box, Tensor]]]]:
    """Copies of the boxes of every tensor of the optimizer's state."""
    return [(key, [(b, p.clone()) for b, p in pieces]) for key, _, pieces in optimizer.sharded_state()]


def assert_trained_as_whole(results: Sequence[dict[str, Any]]) -> None:
    """All ranks' `train_shards` did what `train_whole` does."""
    norms, gradients, weights = train_whole()
    for result in results:
        torch.testing.assert_close(result["norms"], norms, rtol=1e-6, atol=0)
        assert all((padding == 0).all() for padding in result["padding"])
    for step in range(STEPS):
        found = assemble(result["gradients"][step] for result in results)
        torch.testing.assert_close(found, gradients[step], rtol=0, atol=GRADIENT_TOLERANCE)
    found = assemble(result["weights"] for result in results)
    torch.testing.assert_close(found, weights, rtol=0, atol=WEIGHT_TOLERANCE)
    state = assemble(result["state"] for result in results)
    assert state.keys() == {f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq") for name in GLOBAL_SHAPES}


LAYOUTS = {
    "tensor": ParallelLayout(world_size=2, tensor=2),
    "kv copies": ParallelLayout(world_size=2, tensor=2, kv_replicas=2),
    "pipeline": ParallelLayout(world_size=2, pipeline=2),
    "data": ParallelLayout(world_size=2),
    "tensor x data": ParallelLayout(world_size=4, tensor=2, kv_replicas=2),
    "tensor x replicas": ParallelLayout(world_size=4, tensor=2, zero=1),
    "pipeline x tensor": ParallelLayout(world_size=4, pipeline=2, tensor=2),
    "pipeline x data": ParallelLayout(world_size=4, pipeline=2),
    "zero x replicas": ParallelLayout(world_size=4, zero=2),
    "context": ParallelLayout(world_size=2, context=2),
    "data x context": ParallelLayout(world_size=4, context=2),
    "zero x context": ParallelLayout(world_size=4, context=2, zero=2),
    "context x tensor": ParallelLayout(world_size=4, context=2, tensor=2, kv_replicas=2),
    "pipeline x context": ParallelLayout(world_size=4, pipeline=2, context=2, zero=1),
    "isp": ParallelLayout(world_size=4, mode="isp", tensor=2, weight=2),
    "isp x replicas": ParallelLayout(world_size=4, mode="isp", tensor=4, weight=2, zero=1),
    "isp x context": ParallelLayout(world_size=4, mode="isp", tensor=2, context=2, weight=2, head_first=False),
    "isp x pipeline": ParallelLayout(world_size=4, mode="isp", pipeline=2, tensor=2, weight=2),
}

assert all(math.prod(view.axes.values()) == layout.world_size for layout in LAYOUTS.values() for view in layout.views)
