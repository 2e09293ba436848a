"""Steps that show what CUDA graphs could get wrong: other data each time, micro batches, evaluations between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.tiny import micro_batch
from internlm.core.engine import Engine
from internlm.data.batch import Batch, MicroBatch

NUM_MICRO_BATCHES = 3
STEPS = 4

DOCUMENTS = ((7, 1, 12), (20,), (3, 2, 5, 10), (19, 1), (4, 4, 4, 4, 4), (1,) * 20)
"""Lengths of the documents of micro batches, of 20 tokens each."""


class Found(NamedTuple):
    """What a training gave, in the order in which it came: losses of steps and of evaluated tokens; global and flat
    gradients; how far the flat weights went from where they were."""

    losses: list[Tensor]
    gradients: list[Tensor]
    updates: list[Tensor]


class Losses:
    """Collects the losses of tokens."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def update(self, token_losses: Tensor, *_: Any) -> None:
        self.found.append(token_losses.clone())


def packed(step: int, scale: int = 1) -> Batch:
    """Documents in other numbers each time, `scale` times as long as in `DOCUMENTS`."""
    indices = [NUM_MICRO_BATCHES * step + number for number in range(NUM_MICRO_BATCHES)]
    lengths = [tuple(scale * length for length in DOCUMENTS[index % len(DOCUMENTS)]) for index in indices]
    micros = [micro_batch(index, own) for index, own in zip(indices, lengths, strict=True)]
    return Batch(micros, num_samples=NUM_MICRO_BATCHES, sample_indices=indices)


def rows(step: int, scale: int = 1) -> Batch:
    """The same tokens as two rows a micro batch, without documents."""
    batch = packed(step, scale)
    batch.micro_batches = [_as_rows(micro) for micro in batch.micro_batches]
    return batch


def _as_rows(micro: MicroBatch) -> MicroBatch:
    ids, labels, types = (tensor.view(2, -1) for tensor in (micro.input_ids, micro.labels, micro.type_ids))
    positions = torch.arange(ids.shape[1]).repeat(2, 1)
    return MicroBatch(ids, labels, positions, types, None, None, micro.num_valid_tokens)


def train(engine: Engine, batches: Callable[[int], Batch], lr: float) -> Found:
    """Some steps, each with an evaluation behind it."""
    buckets = engine.optimizer.buckets  # type: ignore[attr-defined]
    before = [bucket.master.clone() for bucket in buckets]
    found = Found([], [], [])
    for step in range(STEPS):
        result = engine.train_step(batches(step), lr)
        found.losses.append(result.loss)
        found.gradients.extend([result.grad_norm, *(bucket.grad_shard.clone() for bucket in buckets)])
        losses = Losses()
        engine.evaluate(batches(step + STEPS).micro_batches[0], losses)
        found.losses.extend(losses.found)
    found.updates.extend(bucket.master - old for bucket, old in zip(buckets, before, strict=True))
    return found
