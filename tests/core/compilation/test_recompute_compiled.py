"""Recomputation and offload of compiled layers: recomputation is inside of the graph where a layer is one, and around
the compiled parts where it is cut."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from helpers.ranks import RankPool
from helpers.tiny import micro_batch, tiny_config
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from internlm.core.compilation.compile_layers import compile_layers
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.model.offload import Offloading
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.recompute import SAVE_POLICIES, SavePolicy
from internlm.model.registry import build_model
from internlm.utils.copy_stream import CopyStream

LENGTHS = (7, 1, 12, 4)

LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mtp": ({"world_size": 2, "tensor": 2, "mode": "mtp"}, {}),
    "fsp": ({"world_size": 2, "tensor": 2, "mode": "fsp"}, {}),
    "isp": ({"world_size": 2, "tensor": 2, "weight": 2, "mode": "isp"}, {"weight_gathering": GatherPlan(overlap=True)}),
    "postponed": ({"world_size": 1}, {"postpone_weight_gradients": True}),
}


def build(policy: SavePolicy, layout: dict[str, Any], **options: Any) -> nn.Module:
    recomputing = {} if policy == "everything" else {"checkpoint": 1.0, "checkpoint_save_policy": policy}
    with torch.device("meta"):
        model = build_model("LLAMA2", tiny_config(**recomputing))
    return parallelize(
        model, ParallelContext.create(ParallelLayout(**layout)), seed=7, options=ParallelOptions(**options)
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    micro = micro_batch(0, LENGTHS)
    parallel = parallel_of(model)
    hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(LENGTHS))
    output = parallel.head_loss(model, hidden, micro.labels, micro.type_ids, linear_cross_entropy)
    output.loss.loss_sum.backward()
    parallel.end_backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to rounding: autograd and a compiler's derivatives group operations anew, a handful in each layer."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 16 * 2.0**-24 * gradient.norm(), name


@pytest.mark.parametrize("policy", SAVE_POLICIES)
def test_the_compiler_recomputes_what_is_not_kept(policy: SavePolicy) -> None:
    graphs: list[Counter[str]] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    model = compile_layers(build(policy, {}), backend=backend)  # type: ignore[arg-type]
    found = gradients(model)
    assert_close(found, gradients(build("everything", {})))
    _, backward = graphs
    # Seven products have two derivatives each; the last of them (w2) is never needed again.
    products = sum(number for name, number in backward.items() if name in ("aten.mm.default", "aten.addmm.default"))
    again = {"everything": (0, 0), "matmuls": (0, 0), "attention": (0, 6), "nothing": (1, 6)}[policy]
    assert (backward["internlm.cpu_attention.default"], products - 14) == again


@pytest.mark.parametrize("options", [{}, {"postpone_weight_gradients": True}], ids=["whole", "parts"])
@pytest.mark.parametrize("policy", ["everything", "matmuls"])
def test_what_compiled_layers_save_may_move_to_the_host(policy: SavePolicy, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    plain, moved = build(policy, {}, **options), build(policy, {}, **options)
    for model in (plain, moved):
        compile_layers(model, backend="aot_eager")
    moved.offloading = Offloading(CopyStream(), autograd_layers=range(2), smallest=1)  # type: ignore[assignment]
    moved.offloading.log = log = []  # type: ignore[assignment,union-attr]
    expected, found = gradients(plain), gradients(moved)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert log == [("copy", 0), ("copy", 1), ("release", 0), ("load", 0)]


def in_layout(layout: str, policy: SavePolicy, compiled: bool) -> dict[str, Tensor]:
    torch._dynamo.reset()
    sizes, options = LAYOUTS[layout]
    model = build(policy, sizes, **options)
    if compiled:
        compile_layers(model, backend="aot_eager")
    result = gradients(model)
    parallel_of(model).context.close()
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_in_parts_may_be_recomputed(layout: str, ranks: Any) -> None:
    pool: RankPool = ranks(LAYOUTS[layout][0]["world_size"])
    expected = pool.run(in_layout, layout, "everything", False)
    for policy in SAVE_POLICIES:
        for found, wanted in zip(pool.run(in_layout, layout, policy, True), expected, strict=True):
            assert_close(found, wanted)
