"""CUDA graphs of compiled layers, with a stand-in for replays on the CPU; on a GPU: tests/cuda/test_cuda_graphs.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.configs import small_config
from helpers.graphed_steps import DOCUMENTS, NUM_MICRO_BATCHES, STEPS, Found, packed, rows, train
from helpers.ranks import RankPool
from helpers.replays import Replays
from helpers.tiny import micro_batch, tiny_config, tiny_engine, tiny_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from internlm.core.compilation.compile_layers import compile_layers
from internlm.core.compilation.cuda_graphs import MODE
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.core.parallel.parallelize import parallelize
from internlm.data.batch import Batch
from internlm.initialize import stages
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.registry import build_model

CALLS = ([4] * NUM_MICRO_BATCHES + [2]) * STEPS
"""Of compiled functions, pass by pass: two layers go forward and back with a micro batch, and forward to evaluate."""


def compiled_engine(
    model: nn.Module, context: ParallelContext, backend: Any, cuda_graphs: bool, **optimizer: Any
) -> Engine:
    torch._dynamo.reset()
    compile_layers(model, backend=backend, cuda_graphs=cuda_graphs)
    return tiny_engine(context, model=model, clip_grad_norm=0.5, reduce_bucket_size=3000, **optimizer)


def assert_same(found: Found, expected: Found) -> None:
    for own, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(own, wanted, strict=True))


def _on_a_data_rank(cuda_graphs: bool) -> tuple[Found, list[int]]:
    context = ParallelContext.create(ParallelLayout(world_size=2))
    with pytest.MonkeyPatch.context() as monkeypatch:
        replays = Replays(monkeypatch)
        engine = compiled_engine(
            tiny_model(context),
            context,
            replays.backend if cuda_graphs else "aot_eager",
            cuda_graphs,
            overlap_sync_grad=True,
            overlap_sync_param=True,
        )
        replays.watch(engine.model)
        found = train(engine, lambda step: packed(2 * step + context.rank), 1e-2)
    context.close()
    return found, replays.calls


def test_data_parallel_ranks(ranks: Callable[[int], RankPool]) -> None:
    """Gradients are reduced and weights gathered while layers run. The first test of this file: a process in which a
    compiled backward pass has run cannot fork ranks with every build of torch."""
    pool = ranks(2)
    expected = pool.run(_on_a_data_rank, False)
    for (found, calls), (wanted, _) in zip(pool.run(_on_a_data_rank, True), expected, strict=True):
        assert_same(found, wanted)
        assert calls == CALLS


@pytest.mark.parametrize("batches", [packed, rows])
@pytest.mark.parametrize(
    "changes", [{}, {"checkpoint": 1.0}, {"checkpoint": 1.0, "checkpoint_save_policy": "attention"}], ids=str
)
def test_nothing_is_read_that_a_replay_has_overwritten(
    batches: Callable[[int], Batch], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ParallelContext.create()
    replays = Replays(monkeypatch)
    expected = train(compiled_engine(tiny_model(context, **changes), context, "aot_eager", False), batches, 1e-2)
    engine = compiled_engine(tiny_model(context, **changes), context, replays.backend, True)
    replays.watch(engine.model)
    found = train(engine, batches, 1e-2)
    assert_same(found, expected)
    assert replays.calls == CALLS
    assert set(replays.modes) == {MODE}


def test_the_stand_in_sees_what_is_read_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients left in `.grad`, and passes before the backward pass of another: both are wrong with replays."""

    def gradients(model: nn.Module, in_turns: bool) -> dict[str, Tensor]:
        hidden = []
        for index in range(2):
            micro = micro_batch(index)
            hidden.append(model(micro.input_ids, micro.position_ids, VarlenMetadata.of((7, 1, 12))))
            if in_turns:
                hidden.pop().sum().backward()
        for output in hidden:
            output.sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    context = ParallelContext.create()
    replays = Replays(monkeypatch)
    for in_turns in (True, False):
        torch._dynamo.reset()
        expected = gradients(compile_layers(tiny_model(context), backend="aot_eager"), in_turns)
        torch._dynamo.reset()
        model = compile_layers(tiny_model(context), backend=replays.backend, cuda_graphs=True)
        replays.watch(model)
        found = gradients(model, in_turns)
        assert found.keys() == expected.keys()
        wrong = {name for name in found if not torch.equal(found[name], expected[name])}
        assert {name for name in found if name.startswith("layers.")} <= wrong


def test_batches_of_any_documents_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    torch._dynamo.reset()
    model = tiny_model(ParallelContext.create())
    compile_layers(model, backend=lambda graph, inputs, mode: counter(graph, inputs), cuda_graphs=True)
    shapes = set()
    model.layers["0"].register_forward_pre_hook(  # type: ignore[index,union-attr]
        lambda _, args: shapes.add((len(args[2].cu_seqlens), args[2].max_seqlen))
    )
    for lengths in DOCUMENTS:
        micro = micro_batch(0, lengths)
        model(micro.input_ids, micro.position_ids, VarlenMetadata.of(lengths)).sum().backward()
    # The longest of them has 20, 19, 12, 10, 4 or 1 of the row's 20 tokens; the last has 20 of them.
    assert shapes == {(17, 20), (17, 16), (17, 4), (33, 1)}
    # A graph is compiled for the first shape, and perhaps for any bounds, any numbers, and both.
    assert counter.frame_count <= 4


@pytest.mark.parametrize("number", range(1, 70))
def test_rounded_segments_are_the_same_documents(number: int) -> None:
    lengths = tuple(1 + index * index % 7 for index in range(number))
    found = VarlenMetadata.of(lengths).rounded()
    assert found.lengths[:number] == lengths and not any(found.lengths[number:])
    expected = VarlenMetadata.of(found.lengths)
    assert torch.equal(found.cu_seqlens, expected.cu_seqlens) and found.cu_seqlens.dtype == torch.int32
    assert len(found.lengths) == next(size for size in (16, 32, 64, 128) if size >= number)
    assert max(lengths) <= found.max_seqlen <= min(2 * max(lengths) - 1, sum(lengths))


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ({"world_size": 2, "pipeline": 2}, {}),
        ({"world_size": 2, "tensor": 2}, {}),
        ({"world_size": 1, "mode": "isp"}, {}),
        ({"world_size": 1}, {"postpone_weight_gradients": True}),
    ],
    ids=str,
)
def test_what_graphs_cannot_be_made_of(layout: dict[str, Any], options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = build_model("INTERNLM2", tiny_config())
    # Without process groups: nothing is computed.
    context = ParallelContext(ParallelLayout(**layout), 0, torch.device("cpu"))
    model = parallelize(model, context, options=ParallelOptions(**options))
    with pytest.raises(ValueError, match="neither communicate nor postpone"):
        compile_layers(model, cuda_graphs=True)


def test_experts_are_refused() -> None:
    config = tiny_config(num_experts=4, top_k=2, moe_type="Dropless")
    with torch.device("meta"):
        model = build_model("QWEN3MOE", config)
    parallelize(model, ParallelContext(ParallelLayout(), 0, torch.device("cpu")))
    with pytest.raises(ValueError, match="without experts"):
        compile_layers(model, cuda_graphs=True)


def test_the_mode_is_the_one_with_graphs() -> None:
    assert torch._inductor.list_mode_options(MODE) == {"triton.cudagraphs": True}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("wanted", [False, True])
def test_a_config_that_asks_for_graphs_gets_them_on_a_gpu(
    device: str, wanted: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(stages, "build_stages", lambda *_, **__: [nn.Module()])
    monkeypatch.setattr(stages, "check_compiler", lambda *_, **__: None)
    monkeypatch.setattr(stages, "arrange_activations", lambda *_: None)
    monkeypatch.setattr(stages, "compile_layers", lambda _, *, cuda_graphs: asked.append(cuda_graphs))
    context: Any = SimpleNamespace(device=torch.device(device), layout=None)
    with caplog.at_level("WARNING"):
        stages.build_chunks(small_config({"model.compile": True, "model.cuda_graphs": wanted}), context)
    assert asked == [wanted and device == "cuda"]
    assert ("model.cuda_graphs has no effect" in caplog.text) == (wanted and device == "cpu")
