"""Estimated memory of ranks: bytes against real buffers, parameters against the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.configs import small_config
from helpers.ranks import RankPool
from torch import Tensor

from internlm.config.loader import load_config
from internlm.config.schema import Config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import local_tensor
from internlm.estimate.memory import RankMemory
from internlm.initialize.build import build_layout
from internlm.initialize.rank_estimates import estimate_ranks
from internlm.initialize.stages import build_chunks, build_meta_model, build_pipeline_schedule, state_form
from internlm.solver.optimizer.bucket import ALIGNMENT, NORM_ROW
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.verify.case import changed
from internlm.verify.choices import LayoutChoices

ROOT = Path(__file__).parents[2]

PIPELINES = {
    "none": {},
    "1F1B": {"parallel.pipeline": {"size": 2}},
    "interleaved": {"parallel.pipeline": {"size": 2}, "model.num_chunks": 2},
    "ZBV": {"parallel.pipeline": {"size": 2, "mode": "ZBV"}},
}


def memories(config: Config, world_size: int) -> list[RankMemory]:
    """Memory of every rank of the pipeline of rank 0."""
    layout = build_layout(config, world_size)
    schedule = build_pipeline_schedule(config)(config.data.micro_num)
    ranks = layout.activation.group("pipeline", 0)
    return [estimate.memory for estimate in estimate_ranks(config, layout, schedule, ranks)]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_ranks_of_a_pipeline_hold_the_model_once(pipeline: str) -> None:
    config = small_config({**PIPELINES[pipeline], "model.dtype": "torch.bfloat16"})
    parameters = sum(parameter.numel() for parameter in build_meta_model(config).parameters())
    whole = RankMemory.sum(memories(config, 2))
    assert (whole.parameters, whole.weights) == (parameters, 2 * parameters)


@pytest.mark.parametrize(("pipeline", "copies"), [("none", 1), ("1F1B", 2), ("interleaved", 2), ("ZBV", 1)])
def test_a_tied_embedding_is_held_where_an_end_of_the_model_is(pipeline: str, copies: int) -> None:
    config = small_config({**PIPELINES[pipeline], "model.tie_word_embeddings": True})
    model = build_meta_model(config)
    names = dict(model.named_parameters())
    embedding = names["tok_embeddings.weight"].numel()
    expected = sum(parameter.numel() for parameter in names.values()) + (copies - 1) * embedding
    assert RankMemory.sum(memories(config, 2)).parameters == expected


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def real_bytes(config: Config, world_size: int) -> tuple[RankMemory, int]:
    """What this rank's optimizer allocates, and how many elements of each buffer may be padding."""
    context = ParallelContext.create(build_layout(config, world_size))
    chunks = build_chunks(config, context)
    optimizer = HybridZeroOptimizer(chunks, context, form=state_form(config))
    buckets, is_offloaded = optimizer.buckets, optimizer.form.is_offloaded
    parameters = {parameter for chunk in chunks for parameter in chunk.parameters()}
    local = [local_tensor(parameter) for parameter in parameters]
    gradients = {buffer for bucket in buckets for buffer in (bucket.grad_buffer, bucket.grad_shard)}
    # Where a master is the parameter itself, it takes no memory of its own.
    masters = sum(b.master.nbytes for b in buckets if storage(b.master) not in map(storage, local))
    moments = sum(moment.nbytes for state in optimizer.states for moment in state.tensors.values())
    memory = RankMemory(
        parameters=sum(tensor.numel() for tensor in local),
        weights=sum(tensor.nbytes for tensor in local),
        gradients=sum(buffer.nbytes for buffer in gradients),
        masters=0 if is_offloaded else masters,
        moments=0 if is_offloaded else moments,
        host=masters + moments if is_offloaded else 0,
    )
    # Without a collective in between, a fast rank would close the groups while a slow one still opens them.
    dist.barrier()
    context.close()
    return memory, len(parameters) * ALIGNMENT + NORM_ROW * sum(bucket.groups.zero_size for bucket in buckets)


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float32", "torch.float64"])
@pytest.mark.parametrize(
    "parallel",
    [
        PIPELINES["ZBV"],
        {**PIPELINES["1F1B"], "parallel.zero1.size": 1},
        {"parallel.tensor": {"size": 2, "mode": "mtp"}},
        {"parallel.tensor": {"size": 2, "mode": "isp"}, "parallel.weight.size": 2},
        {"parallel.fsdp.enable": True},
        {"parallel.fsdp.enable": True, "parallel.zero1.size": 2},
    ],
    ids=str,
)
def test_bytes_are_those_of_a_real_optimizer(
    ranks: Callable[[int], RankPool], dtype: str, parallel: dict[str, object]
) -> None:
    config = small_config({**parallel, "model.dtype": dtype, "model.hidden_size": 64})
    real = ranks(4).run(real_bytes, config, 4)
    pipeline = build_layout(config, 4).activation.group("pipeline", 0)
    for rank, expected in zip(pipeline, memories(config, 4), strict=True):
        memory, padding = real[rank]
        assert (memory.parameters, memory.weights) == (expected.parameters, expected.weights)
        for name, size in (("gradients", 8), ("masters", 4), ("moments", 8), ("host", 12)):
            found, wanted = getattr(memory, name), getattr(expected, name)
            assert 0 <= found - wanted <= size * padding, name
            # Padding could not hide a kind of buffer that was forgotten.
            assert wanted == 0 or 2 * size * padding < wanted, name


FORMS = {
    "bf16 gradients": {"hybrid_zero_optimizer.grad_accumulation_dtype": "torch.bfloat16"},
    "bf16 moments": {"adam.moments_dtype": "torch.bfloat16"},
    "offloaded": {"hybrid_zero_optimizer.offload_optimizer": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parallel", [{}, {"parallel.fsdp.enable": True}], ids=["zero", "fsdp"])
def test_bytes_in_other_forms(ranks: Callable[[int], RankPool], form: str, parallel: dict[str, object]) -> None:
    """bf16 weights with fp32 norms, whose gradients stay in fp32."""
    test_bytes_are_those_of_a_real_optimizer(
        ranks, "torch.bfloat16", {**parallel, **FORMS[form], "use_fp32_norm": True}
    )


FROZEN = {"optimizer.groups": [{"match": "tok_embeddings.*", "freeze": True}, {"match": "layers.1.*", "freeze": True}]}


@pytest.mark.parametrize("parallel", [PIPELINES["1F1B"], {"parallel.fsdp.enable": True}], ids=str)
def test_frozen_weights_have_no_gradient_and_no_state(
    ranks: Callable[[int], RankPool], parallel: dict[str, object]
) -> None:
    test_bytes_are_those_of_a_real_optimizer(ranks, "torch.bfloat16", {**parallel, **FROZEN})
    config = small_config({**parallel, **FROZEN, "model.dtype": "torch.bfloat16"})
    whole = RankMemory.sum(memories(config, 2))
    trained = small_config({**parallel, "model.dtype": "torch.bfloat16"})
    without = RankMemory.sum(memories(trained, 2))
    assert whole.weights == without.weights
    assert whole.gradients < without.gradients and whole.moments < without.moments


def test_a_7b_model_takes_a_step_on_one_device() -> None:
    """The bytes by part that doc/memory.md gives; the numbers of parameters are those of the model's card."""
    config = load_config(ROOT / "configs" / "7B_internlm2.py", world_size=8).config
    page = (ROOT / "doc" / "memory.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(("| float32", "| bfloat16"))]
    assert len(rows) == 8
    for row in rows:
        gradients, moments, offload, *sizes = (cell.strip() for cell in row.strip("|").split("|"))
        keys = {
            **LayoutChoices().keys(),
            "hybrid_zero_optimizer.grad_accumulation_dtype": f"torch.{gradients}",
            "adam.moments_dtype": f"torch.{moments}",
            "hybrid_zero_optimizer.offload_optimizer": offload == "yes",
        }
        (memory,) = memories(changed(config, keys), 1)
        assert memory.parameters == 7_737_708_544
        found = [memory.weights, memory.gradients, memory.masters, memory.moments, memory.all_bytes, memory.host]
        assert sizes[:-1] == [f"{size / 2**30:.1f}" for size in found], row
