"""Compiled layers: one graph where nothing is exchanged, and the numbers of plain ones in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.model import LATENT
from helpers.ranks import RankPool
from helpers.tiny import global_batch, micro_batch, tiny_config, tiny_engine, tiny_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from internlm.core.communication.collectives import all_reduce
from internlm.core.compilation import compile_layers as compile_module
from internlm.core.compilation.compile_layers import check_compiler, compile_layers
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import apply_fsdp
from internlm.core.parallel.layers import layers_of
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model
from internlm.utils.errors import ConfigError

LENGTHS = (7, 1, 12, 4)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": ("INTERNLM2", {}),
    "biases": ("INTERNLM", {"num_kv_attention_heads": 4}),
    "separate": ("LLAMA2", {}),
    "qk_norm": ("QWEN3", {}),
    "offset_norm": ("GEMMA", {}),
    "norm_head": ("BAICHUAN2", {"num_kv_attention_heads": 4}),
    "window": ("MISTRAL", {"sliding_window": 5}),
    "layer_norm": ("LLAMA2", {"norm_type": "layernorm"}),
    "interleaved": ("INTERNLM2", {"qk_interleaved": True}),
    "fp32_residual": ("INTERNLM2", {"residual_in_fp32": True, "dtype": "torch.bfloat16"}),
    "latent": ("DEEPSEEK_V2", LATENT),
}

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mtp": ({"world_size": 2, "tensor": 2, "mode": "mtp"}, {}),
    "msp": ({"world_size": 2, "tensor": 2, "mode": "msp"}, {}),
    "fsp": ({"world_size": 2, "tensor": 2, "mode": "fsp"}, {}),
    "isp": ({"world_size": 2, "tensor": 2, "weight": 2, "mode": "isp"}, {"weight_gathering": GatherPlan(overlap=True)}),
    "context": ({"world_size": 2, "context": 2}, {}),
    "context and isp": ({"world_size": 2, "context": 2, "weight": 2, "mode": "isp"}, {}),
    "postponed": ({"world_size": 1}, {"postpone_weight_gradients": True}),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def build(model_type: str, changes: dict[str, Any], layout: ParallelLayout | None = None, **options: Any) -> nn.Module:
    context = ParallelContext.create(layout) if layout else ParallelContext.create()
    with torch.device("meta"):
        model = build_model(model_type, tiny_config(**changes))
    return parallelize(model, context, seed=7, options=ParallelOptions(**options))


def loss_and_gradients(model: nn.Module, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, dict[str, Tensor]]:
    parallel = parallel_of(model)
    sample = parallel.split_sample(micro_batch(0, lengths))
    micro = sample.micro_batch
    hidden = model(micro.input_ids, micro.position_ids, sample.documents(micro))
    output = parallel.head_loss(model, hidden, micro.labels, micro.type_ids, linear_cross_entropy)
    output.loss.loss_sum.backward()
    parallel.end_backward()
    loss = output.loss.loss_sum.detach()
    for axis in parallel.token_axes:
        all_reduce(loss, parallel.context.group(axis))
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Up to rounding: a compiler orders sums anew, and keeps in fp32 what is rounded between two operations."""
    eps = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
    gradients = expected[1]
    assert found[1].keys() == gradients.keys()
    # A few roundings in each of a handful of operations a layer, one after the other, that add up like a walk.
    factor = 16
    dtype = next(iter(gradients.values())).dtype
    torch.testing.assert_close(found[0], expected[0], rtol=factor * eps[dtype], atol=0.0)
    for name, gradient in gradients.items():
        error = (found[1][name].double() - gradient.double()).norm()
        assert error <= factor * eps[gradient.dtype] * gradient.double().norm(), name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_is_one_graph(name: str) -> None:
    model_type, changes = FAMILIES[name]
    counter = CompileCounterWithBackend("aot_eager")
    expected = loss_and_gradients(build(model_type, changes))
    model = compile_layers(build(model_type, changes), backend=counter)
    assert_close(loss_and_gradients(model), expected)
    kinds = len({model.architecture.windows[layer] for layer in range(len(layers_of(model)))})
    assert counter.frame_count == kinds
    # The second number of documents is compiled once, for any number; then other documents are no reason any more.
    loss_and_gradients(model, (11, 13))
    assert counter.frame_count <= 2 * kinds
    compiled = counter.frame_count
    for lengths in ((24,), (2, 3, 5, 14), (1, 2, 3, 4, 5, 9)):
        loss_and_gradients(model, lengths)
    assert counter.frame_count == compiled


def _in_layout(
    family: tuple[str, dict[str, Any]], layout: dict[str, Any], options: dict[str, Any], compiled: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    torch._dynamo.reset()
    model = build(*family, ParallelLayout(**layout), **options)
    if compiled:
        compile_layers(model, backend="aot_eager")
    result = loss_and_gradients(model)
    parallel_of(model).context.close()
    return result


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "fused") for name in LAYOUTS),
        ("context", "window"),
        *((mode, "latent") for mode in ("mtp", "msp", "isp", "context")),
    ],
)
def test_modes(name: str, family: str, ranks: Callable[[int], RankPool]) -> None:
    layout, options = LAYOUTS[name]
    pool = ranks(layout["world_size"])
    plain = pool.run(_in_layout, FAMILIES[family], layout, options, False)
    compiled = pool.run(_in_layout, FAMILIES[family], layout, options, True)
    for found, expected in zip(compiled, plain, strict=True):
        assert_close(found, expected)


def _sharded(compiled: bool) -> list[float]:
    context = ParallelContext.create(ParallelLayout(world_size=2))
    model = tiny_model(context)
    if compiled:
        compile_layers(model, backend="aot_eager")
    engine = tiny_engine(context, model=apply_fsdp(model, context), clip_grad_norm=0.5)
    batches = (global_batch(step, rank=context.rank, world_size=2) for step in range(3))
    numbers = [engine.train_step(batch, 3e-3) for batch in batches]
    context.close()
    return [float(value) for result in numbers for value in (result.loss, result.grad_norm)]


def test_fsdp(ranks: Callable[[int], RankPool]) -> None:
    pool = ranks(2)
    expected, found = pool.run(_sharded, False)[0], pool.run(_sharded, True)
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-5)


def test_what_communicates_is_left_as_it_is() -> None:
    """Around each of its four groups of linear layers a layer is cut, and what lies between is compiled once."""
    counter = CompileCounterWithBackend("aot_eager")
    model = compile_layers(build("INTERNLM2", {}, ParallelLayout(world_size=1, mode="isp")), backend=counter)
    loss_and_gradients(model)
    first = counter.frame_count
    loss_and_gradients(model)
    # Four cuts leave five pieces at least, none of which multiplies by a weight.
    assert counter.frame_count == first >= 5
    assert not any("linear" in str(node.target) for graph in counter.graphs for node in graph.graph.nodes)


def test_generated_code() -> None:
    expected = loss_and_gradients(build("INTERNLM2", {}))
    assert_close(loss_and_gradients(compile_layers(build("INTERNLM2", {}))), expected)


def test_recomputed_layers() -> None:
    expected = loss_and_gradients(build("INTERNLM2", {}))
    model = compile_layers(build("INTERNLM2", {"checkpoint": 1.0}), backend="aot_eager")
    assert_close(loss_and_gradients(model), expected)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    check_compiler(torch.device("cpu"), key="model.compile")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"model\.compile = True: no C\+\+ compiler was found \(g\+\+ or clang\+\+\)"):
        check_compiler(torch.device("cpu"), key="model.compile")
    monkeypatch.setattr(compile_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton"):
        check_compiler(torch.device("cuda"), key="model.compile")
