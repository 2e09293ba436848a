"""Estimated bytes sent in a step, against the calls of torch.distributed in a real one: exact in every mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from helpers.configs import small_config
from helpers.ranks import RankPool
from helpers.tiny import micro_batch
from torch import Tensor

from internlm.config.schema import Config
from internlm.core.communication import collectives
from internlm.core.communication.p2p import Channel, PipelineChannels
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.batch import Batch
from internlm.estimate.collective_bytes import all_gather_bytes, all_reduce_bytes
from internlm.estimate.communication import BytesSent
from internlm.initialize.build import build_engine, build_layout
from internlm.initialize.rank_estimates import estimate_ranks
from internlm.initialize.stages import build_chunks, build_pipeline_schedule
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.verify.choices import LATENT_KEYS

SCALARS = 16
"""All-reduces of so few elements are token counts, norms, metrics and float8 scales, all-to-alls of so few are numbers
of tokens of experts, which estimates leave out."""

AXES = {
    "activation": {
        "tensor": "tensor", "kv_replica": "tensor", "data": "data",
        "pipeline": "pipeline", "pipeline_ends": "pipeline",
    },
    "weight": {
        "weight": "weight", "zero": "data", "weight_data": "data", "weight_data_replica": "data",
        "data": "data", "data_replica": "data",
    },
    "expert": {"expert": "expert", "expert_data": "data", "zero": "data", "expert_data_replica": "data"},
}  # fmt: skip


def axis_of(context: ParallelContext, group: Any) -> str:
    """Which of the axes of `BytesSent` a process group is of; others belong to the pipeline."""
    for view, names in AXES.items():
        for name, axis in names.items():
            has_axis = name in (*context.view(view).axes, *context.view(view).merged, "pipeline_ends")
            if has_axis and context.group(name, view) is group:
                return axis
    return "pipeline"


@contextmanager
def counted(context: ParallelContext) -> Iterator[Counter[str]]:
    """Counts the bytes that this rank sends, by axis."""
    sent: Counter[str] = Counter()

    def counting(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            ranks = dist.get_world_size(group)
            if name not in ("all_reduce", "all_to_all_single") or tensor.numel() > SCALARS:
                if name == "all_reduce":
                    moved = all_reduce_bytes(tensor.nbytes, ranks)
                elif name.startswith("reduce_scatter"):
                    moved = all_gather_bytes(tensor.nbytes * ranks, ranks)
                else:
                    moved = all_gather_bytes(tensor.nbytes, ranks)
                sent[axis_of(context, group)] += moved  # type: ignore[assignment]
            return real(tensor, *args, **kwargs)

        return call

    real_send, real_batch = PipelineChannels.send, dist.batch_isend_irecv

    def send(channels: PipelineChannels, channel: Channel, tensor: Tensor, *args: Any) -> None:
        sent["pipeline"] += tensor.nbytes
        real_send(channels, channel, tensor, *args)

    def batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        """Keys and values of context ranks, and their gradients."""
        sent["context"] += sum(each.tensor.nbytes for each in operations if each.op is dist.isend)
        return real_batch(operations)

    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    with (
        patch.object(dist, "all_reduce", counting(dist.all_reduce, "all_reduce")),
        patch.object(PipelineChannels, "send", send),
        patch.object(dist, "batch_isend_irecv", batch),
        patch.object(dist, "all_to_all_single", counting(dist.all_to_all_single, "all_to_all_single")),
        # By keyword from FSDP, whose tensors are then `output` or `output_tensor`.
        patch.object(dist, gather, _any_call(counting(getattr(dist, gather), gather))),
        patch.object(dist, scatter, _any_call(counting(getattr(dist, scatter), scatter))),
        patch.object(collectives, "_all_gather", counting(collectives._all_gather, gather)),
        patch.object(collectives, "_reduce_scatter", counting(collectives._reduce_scatter, scatter)),
    ):
        yield sent


def _any_call(count: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if args:
            return count(*args, **kwargs)
        output = kwargs.pop(next(name for name in ("output", "output_tensor") if name in kwargs))
        source = kwargs.pop(next(name for name in ("input", "input_tensor") if name in kwargs))
        return count(output, source, **kwargs)

    return call


def padding_sent(optimizer: HybridZeroOptimizer, context: ParallelContext) -> Counter[str]:
    """Bytes sent for the padding of flat buckets, which estimates leave out."""
    sent: Counter[str] = Counter()
    for bucket in optimizer.buckets:
        padding = bucket.numel - sum(view.numel() for view in bucket.grad_views)
        size, groups = bucket.reduce_dtype.itemsize, bucket.groups
        shard = padding / groups.zero_size * size
        moved: Counter[Any] = Counter()
        moved["data"] += all_gather_bytes(padding * (size + bucket.kind.dtype.itemsize), groups.zero_size)  # type: ignore[assignment]
        if groups.replica is not None:
            moved["data"] += all_reduce_bytes(shard, dist.get_world_size(groups.replica))  # type: ignore[assignment]
        for group in groups.partial:
            if group is not None:
                moved[axis_of(context, group)] += all_reduce_bytes(shard, dist.get_world_size(group))  # type: ignore[assignment]
        sent.update(moved)
    return sent


def really_sent(config: Config, world_size: int) -> dict[str, float]:
    """Bytes that this rank sends in its second step, by axis, without padding."""
    context = ParallelContext.create(build_layout(config, world_size))
    engine = build_engine(config, context, build_chunks(config, context), ["text"])
    data = config.data
    micros = [micro_batch(n, (data.seq_len,) * data.micro_bsz) for n in range(data.micro_num)]
    batch = Batch(micros, num_samples=len(micros), sample_indices=list(range(len(micros))))
    # Loads are metrics.
    engine.routing.finish_step = lambda skipped: {}  # type: ignore[method-assign]
    # The first step also finds out which parameters are in use.
    engine.train_step(batch, 1e-3)
    engine.optimizer.finish_gathering()
    with counted(context) as sent:
        engine.train_step(batch, 1e-3)
        engine.optimizer.finish_gathering()
    assert isinstance(engine.optimizer, HybridZeroOptimizer)
    padding = padding_sent(engine.optimizer, context)
    dist.barrier()
    context.close()
    return {axis: sent[axis] - padding[axis] for axis in ("tensor", "context", "weight", "data", "pipeline", "expert")}


def estimated(config: Config, world_size: int) -> list[BytesSent]:
    schedule = build_pipeline_schedule(config)(config.data.micro_num)
    estimates = estimate_ranks(config, build_layout(config, world_size), schedule, range(world_size))
    sent = [estimate.sent for estimate in estimates]
    assert all(one is not None for one in sent)
    return sent  # type: ignore[return-value]


TENSOR_MODES = {mode: {"parallel.tensor": {"size": 2, "mode": mode}} for mode in ("mtp", "msp", "fsp")}
ISP = {"parallel.tensor": {"size": 2, "mode": "isp"}}
PIPELINE = {"parallel.pipeline": {"size": 2}}

LATENT = {"model_type": "DEEPSEEK_V2", **LATENT_KEYS}

CASES: dict[str, dict[str, Any]] = {
    **{mode: {**changes, "parallel.zero1.size": 2} for mode, changes in TENSOR_MODES.items()},
    "mtp, vocabulary split": {**TENSOR_MODES["mtp"], "model.tie_word_embeddings": True},
    "msp, vocabulary split": {**TENSOR_MODES["msp"], "model.tie_word_embeddings": True},
    "msp, copied key-value heads": {**TENSOR_MODES["msp"], "model.num_kv_attention_heads": 1},
    "isp, split weights": {**ISP, "parallel.weight.size": 4},
    "isp, tied, prefetched": {
        **ISP, "parallel.weight": {"size": 4, "overlap": True}, "model.tie_word_embeddings": True,
    },
    "isp, sequences alone": {**ISP, "parallel.weight.size": 1},
    "isp, copied key-value heads": {**ISP, "parallel.weight.size": 4, "model.num_kv_attention_heads": 1},
    "isp, weights alone": {"parallel.tensor": {"size": 1, "mode": "isp"}, "parallel.weight.size": 2},
    "zero1": {"parallel.zero1.size": 4},
    "hybrid zero": {"parallel.zero1.size": 2},
    "data parallel": {"parallel.zero1.size": 1},
    "fsdp": {"parallel.fsdp.enable": True},
    "hybrid fsdp": {"parallel.fsdp.enable": True, "parallel.zero1.size": 2},
    "fsdp, fp32 norms": {"parallel.fsdp.enable": True, "use_fp32_norm": True},
    "fsdp and mtp": {**TENSOR_MODES["mtp"], "parallel.fsdp.enable": True},
    "context": {"parallel.context.size": 4},
    "context, ring, windows": {
        "parallel.context": {"size": 4, "exchange": "ring"},
        "model.use_sliding_window": True, "model.sliding_window": 4,
    },
    "context, padded": {"parallel.context.size": 4, "data.seq_len": 15, "data.micro_bsz": 1},
    "context and zero": {"parallel.context.size": 2, "parallel.zero1.size": 4},
    "context and msp": {
        **TENSOR_MODES["msp"], "parallel.context.size": 2, "model.num_kv_attention_heads": 1, "data.seq_len": 64,
    },
    "context and isp": {**ISP, "parallel.context.size": 2, "parallel.weight.size": 4, "model.checkpoint": 0.5},
    "1F1B": PIPELINE,
    "interleaved": {**PIPELINE, "model.num_chunks": 2},
    "ZBV": {"parallel.pipeline": {"size": 2, "mode": "ZBV"}},
    "1F1B, tied": {**PIPELINE, "model.tie_word_embeddings": True},
    "1F1B, fp32 residual, msp": {**PIPELINE, **TENSOR_MODES["msp"], "model.residual_in_fp32": True},
    "bf16 gradients": {"hybrid_zero_optimizer.grad_accumulation_dtype": "torch.bfloat16"},
    "gradients sent in bf16": {"reduce_comm_dtype": "torch.bfloat16"},
    "context, latent attention": {"parallel.context.size": 4, **LATENT, "model.checkpoint": 0.5},
    "context and mtp, latent attention": {
        **TENSOR_MODES["mtp"], "parallel.context": {"size": 2, "cut": "zigzag", "exchange": "ring"}, **LATENT,
        "data.seq_len": 66, "model.checkpoint": 0.5,
    },
    "context and msp, latent attention": {
        **TENSOR_MODES["msp"], "parallel.context": {"size": 2, "cut": "zigzag"}, **LATENT, "data.seq_len": 64,
    },
    "context and fsp, latent attention": {
        **TENSOR_MODES["fsp"], "parallel.context": {"size": 2, "cut": "zigzag"}, **LATENT, "data.seq_len": 64,
        "model.q_lora_rank": None, "model.checkpoint": 0.5,
    },
    "context and isp, latent attention": {**ISP, "parallel.context.size": 2, "parallel.weight.size": 4, **LATENT},
    "mtp, latent attention": {**TENSOR_MODES["mtp"], **LATENT},
    "isp, latent attention": {**ISP, "parallel.weight.size": 4, **LATENT},
    "fsp, latent attention, direct queries": {**TENSOR_MODES["fsp"], **LATENT, "model.q_lora_rank": None},
    "msp, latent attention, recomputed": {**TENSOR_MODES["msp"], **LATENT, "model.checkpoint": 0.5},
    "fsp, latent attention, recomputed": {
        **TENSOR_MODES["fsp"], **LATENT, "model.checkpoint": 0.5, "model.checkpoint_save_policy": "matmuls",
    },
}  # fmt: skip

LATER = {"model.num_nextn_predict_layers": 2, "model.checkpoint": 1.0}

CASES |= {
    "later tokens, mtp": {**TENSOR_MODES["mtp"], **LATER, "model.checkpoint": 0.0},
    "later tokens, mtp, recomputed, vocabulary split": {
        **TENSOR_MODES["mtp"], **LATER, "model.tie_word_embeddings": True,
    },
    "later tokens, msp": {**TENSOR_MODES["msp"], **LATER, "model.checkpoint": 0.0},
    "later tokens, msp, recomputed": {**TENSOR_MODES["msp"], **LATER, "model.checkpoint_save_policy": "matmuls"},
    "later tokens, fsp, recomputed, 1F1B": {**TENSOR_MODES["fsp"], **PIPELINE, **LATER},
    "later tokens, fsp, GEMMs saved": {**TENSOR_MODES["fsp"], **LATER, "model.checkpoint_save_policy": "matmuls"},
    "later tokens, isp": {**ISP, "parallel.weight.size": 4, **LATER},
    "later tokens, isp, tied": {**ISP, "parallel.weight.size": 4, **LATER, "model.tie_word_embeddings": True},
    "later tokens, fsdp": {"parallel.fsdp.enable": True, **LATER},
    "later tokens, ZBV, tied": {
        "parallel.pipeline": {"size": 2, "mode": "ZBV"}, **LATER, "model.tie_word_embeddings": True,
    },
    "later tokens, context, windows": {
        "parallel.context": {"size": 4, "cut": "zigzag"}, **LATER,
        "model.use_sliding_window": True, "model.sliding_window": 4, "model.max_window_layers": 2,
    },
    "later tokens, context and mtp, latent attention": {
        **TENSOR_MODES["mtp"], "parallel.context": {"size": 2, "cut": "zigzag"}, **LATENT, **LATER,
        "data.seq_len": 66,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_collectives(ranks: Callable[[int], RankPool], case: str) -> None:
    config = small_config({"model.dtype": "torch.bfloat16", "data.micro_num": 4, **CASES[case]})
    compare(ranks, config)


@pytest.mark.parametrize("policy", ["matmuls", "attention", "nothing"])
@pytest.mark.parametrize("mode", ["mtp", "msp", "fsp", "isp"])
def test_recomputation_repeats_exchanges(ranks: Callable[[int], RankPool], mode: str, policy: str) -> None:
    changes = {**ISP, "parallel.weight.size": 4} if mode == "isp" else TENSOR_MODES[mode]
    recomputed = {"model.checkpoint": 0.5, "model.checkpoint_save_policy": policy}
    compare(ranks, small_config({"model.dtype": "torch.bfloat16", "data.micro_num": 2, **changes, **recomputed}))


@pytest.mark.parametrize(
    "changes", [{"parallel.fsdp.enable": True}, {**ISP, "parallel.weight.size": 4}], ids=["fsdp", "isp"]
)
def test_weights_in_float8(ranks: Callable[[int], RankPool], changes: dict[str, Any]) -> None:
    float8 = {"float8.enable_float8_linear": True, "model.dtype": "torch.bfloat16", "data.micro_num": 2}
    compare(ranks, small_config({**float8, **changes}))


def compare(ranks: Callable[[int], RankPool], config: Config) -> None:
    """All ranks of a job of 4, axis by axis."""
    real = ranks(4).run(really_sent, config, 4)
    for rank, (found, expected) in enumerate(zip(real, estimated(config, 4), strict=True)):
        assert found == pytest.approx(vars(expected), rel=1e-9, abs=1e-6), rank
    assert sum(real[0].values()) > 0


EXPERTS = {
    "model_type": "QWEN2MOE",
    "model.moe_type": "Dropless",
    "model.num_experts": 8,
    "model.top_k": 2,
    "model.num_shared_experts": 1,
    "model.dtype": "torch.bfloat16",
    "data.micro_num": 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel.expert.size": 2, "model.num_shared_experts": 0, "model.checkpoint": 0.5},
        {**TENSOR_MODES["mtp"], "parallel.expert.size": 4, "model.checkpoint": 0.5},
        {**TENSOR_MODES["msp"], "parallel.expert.size": 2, "model.checkpoint": 0.5},
        {**TENSOR_MODES["fsp"], "parallel.expert.size": 4, "model.checkpoint": 0.5, "model.num_shared_experts": 0},
        {**ISP, "parallel.weight.size": 4, "parallel.expert.size": 4, "model.checkpoint": 0.5},
        {"parallel.fsdp.enable": True},
        {**PIPELINE, "parallel.expert.size": 2},
        {**TENSOR_MODES["mtp"], "parallel.expert": {"size": 1, "no_tp": False}},
        {**TENSOR_MODES["msp"], "parallel.expert": {"size": 2, "no_tp": False}, "model.checkpoint": 0.5},
        {**ISP, "parallel.weight.size": 2, "parallel.expert.size": 1, "parallel.expert_weight.size": 2},
        {**TENSOR_MODES["mtp"], "parallel.expert": {"size": 1, "no_tp": False}, **LATER},
        {**TENSOR_MODES["msp"], "parallel.expert.size": 2, **LATER, "model.num_shared_experts": 0},
        {**TENSOR_MODES["mtp"], "parallel.expert.size": 4, **LATER, "model.num_shared_experts": 0},
        {**ISP, "parallel.weight.size": 4, "parallel.expert.size": 4, **LATER},
        {**ISP, "parallel.weight.size": 2, "parallel.expert.size": 1, **PIPELINE, **LATER},
    ],
    ids=str,
)
def test_bytes_of_experts(ranks: Callable[[int], RankPool], changes: dict[str, Any]) -> None:
    """Of all ranks together, as tokens choose: axes that are the same ranks are one group."""
    config = small_config({**EXPERTS, **changes})
    real = sum(sum(found.values()) for found in ranks(4).run(really_sent, config, 4))
    assert real == pytest.approx(sum(sent.all_bytes for sent in estimated(config, 4)), rel=1e-9)
