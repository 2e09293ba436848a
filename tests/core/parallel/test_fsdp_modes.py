"""FSDP on top of the tensor modes: their shards, split by rows over the data ranks, against one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.tiny import global_batch, tiny_config
from torch import Tensor

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import apply_fsdp, local_tensor, reshard
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model
from internlm.solver.optimizer.fsdp_bucket import FsdpBucket
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer

RATE, STEPS, SAMPLES = 3e-3, 3, 4


def train(layout: ParallelLayout, fsdp: bool, by_vocabulary: bool, changes: dict[str, Any]) -> dict[str, Any]:
    """Losses, norms, and this rank's pieces of gradients and weights."""
    context = ParallelContext.create(layout)
    with torch.device("meta"):
        model = build_model("INTERNLM2", tiny_config(**changes))
    parallelize(model, context, seed=7, options=ParallelOptions(split_embedding_hidden=not by_vocabulary))
    if fsdp:
        apply_fsdp(model, context)
    parallel = parallel_of(model)
    optimizer = HybridZeroOptimizer(model, context, weight_decay=0.1, clip_grad_norm=0.5, reduce_bucket_size=3000)
    assert fsdp == all(isinstance(bucket, FsdpBucket) for bucket in optimizer.buckets)
    losses, norms = [], []
    for step in range(STEPS):
        micros = global_batch(step, SAMPLES, context.index("data"), context.size("data")).micro_batches
        valid = global_batch(step, SAMPLES).num_valid_tokens
        optimizer.begin_step(len(micros))
        loss_sum = torch.zeros(())
        for micro in micros:
            hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))  # type: ignore[arg-type]
            output = parallel.head_loss(model, hidden, micro.labels, micro.type_ids, linear_cross_entropy)
            loss = output.loss.loss_sum / valid
            loss.backward()
            loss_sum += loss.detach()
        parallel.end_backward()
        norms.append(float(optimizer.step(RATE).grad_norm))
        for axis in parallel.token_axes:
            all_reduce(loss_sum, context.group(axis))
        losses.append(float(loss_sum))
    reshard(model)
    gradients = [
        (f"gradient/{name}", shard_spec_of(parameter).global_shape, [(box, piece.clone()) for box, piece in pieces])
        for name, parameter, pieces in optimizer.sharded_gradients()
    ]
    weights = []
    for parameter in model.parameters():
        local, spec = local_tensor(parameter), shard_spec_of(parameter)
        boxes = [(box, local[box.local_slices()].clone()) for box in spec.boxes]
        weights.append((spec.name, spec.global_shape, boxes))
    context.close()
    return {"losses": losses, "norms": norms, "pieces": gradients + weights}


def wholes(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Global tensors; NaN where a piece is missing."""
    tensors: dict[str, Tensor] = {}
    for name, shape, pieces in (entry for result in results for entry in result["pieces"]):
        whole = tensors.setdefault(name, torch.full(shape, torch.nan))
        for box, piece in pieces:
            whole[box.global_slices()] = piece
    return tensors


@pytest.mark.parametrize("mode", ["mtp", "msp", "fsp"])
@pytest.mark.parametrize(
    ("by_vocabulary", "changes"),
    [
        (False, {}),
        (True, {"num_kv_attention_heads": 1, "vocab_size": 63}),
        (False, {"tie_word_embeddings": True, "checkpoint": 1.0}),
    ],
    ids=["plain", "kv copies, padded vocabulary", "tied, checkpointed"],
)
def test_fsdp_over_a_tensor_mode_equals_one_process(
    ranks: Callable[[int], RankPool], mode: Any, by_vocabulary: bool, changes: dict[str, Any]
) -> None:
    copies = 2 if changes.get("num_kv_attention_heads") == 1 else 1
    layout = ParallelLayout(world_size=4, tensor=2, mode=mode, kv_replicas=copies)
    alone = train(ParallelLayout(), False, by_vocabulary, changes)
    results = ranks(4).run(train, layout, True, by_vocabulary, changes)
    for result in results:
        # Sums in another order; AdamW makes of a rounding up to a share of lr (1 %, as in test_hybrid_zero.check).
        torch.testing.assert_close(result["losses"], alone["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(result["norms"], alone["norms"], rtol=1e-4, atol=0)
    found, expected = wholes(results), wholes([alone])
    assert found.keys() == expected.keys()
    for name, whole in found.items():
        atol = 1e-5 if name.startswith("gradient/") else 0.01 * RATE * STEPS
        torch.testing.assert_close(whole, expected[name], rtol=0, atol=atol, msg=name)
