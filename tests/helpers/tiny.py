"""A tiny model, and batches for it, that many tests share."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from internlm.config.schema import ModelConfig
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.parallel.parallelize import parallelize
from internlm.data.batch import IGNORE_INDEX, Batch, MicroBatch
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model
from internlm.solver.grad_scaler import ConstantGradScaler, GradScaler
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer

VOCAB = 61


def tiny_config(**changes: object) -> ModelConfig:
    """A two-layer GQA decoder with odd sizes, in fp32."""
    values: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_kv_attention_heads": 2,
        "intermediate_size": 56,
        "dtype": "torch.float32",
        **changes,
    }
    return ModelConfig.model_validate(values)


def tiny_model(context: ParallelContext, model_type: str = "INTERNLM2", seed: int = 7, **changes: object) -> nn.Module:
    """The tiny model on this rank."""
    with torch.device("meta"):
        model = build_model(model_type, tiny_config(**changes))
    return parallelize(model, context, seed=seed)


def micro_batch(index: int, lengths: tuple[int, ...] = (7, 1, 12), masked: float = 0.2) -> MicroBatch:
    """Packed documents that are a pure function of the global sample index; a share of the labels is masked."""
    generator = torch.Generator().manual_seed(1000 + index)
    tokens = torch.randint(0, VOCAB, (sum(lengths) + 1,), generator=generator)
    labels = tokens[1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < masked] = IGNORE_INDEX
    ends = torch.tensor(lengths).cumsum(0)
    labels[ends - 1] = IGNORE_INDEX
    positions = torch.cat([torch.arange(length) for length in lengths])
    return MicroBatch(
        input_ids=tokens[None, :-1],
        labels=labels[None],
        position_ids=positions[None],
        type_ids=torch.zeros_like(labels)[None],
        cu_seqlens=torch.cat([torch.zeros(1), ends]).int(),
        lengths=lengths,
        num_valid_tokens=int((labels != IGNORE_INDEX).sum()),
    )


def global_batch(step: int, size: int = 4, rank: int = 0, world_size: int = 1, **kwargs: object) -> Batch:
    """One rank's share of global batch `step`: `size` samples over all ranks, raggedly masked."""
    indices = [step * size + number for number in range(size)]
    mine = indices[rank::world_size]
    # Different shares of masked labels in each sample; every fourth sample is masked whole.
    micros = [micro_batch(index, masked=(0.1, 0.5, 0.3, 1.0)[index % 4], **kwargs) for index in mine]  # type: ignore[arg-type]
    return Batch(micros, num_samples=size, sample_indices=mine)


def tiny_engine(
    context: ParallelContext, scaler: GradScaler | None = None, model: nn.Module | None = None, **optimizer: object
) -> Engine:
    """An engine around the tiny model; keyword arguments go to the optimizer."""
    model = model or tiny_model(context)
    zero = HybridZeroOptimizer(model, context, scaler or ConstantGradScaler(), **optimizer)  # type: ignore[arg-type]
    return Engine(model, zero, context, partial(linear_cross_entropy, with_accuracy=True))
