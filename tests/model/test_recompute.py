"""Recomputation: no policy changes a bit, each runs again only what it does not policy, and compilers follow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from helpers.memory import PeakMemory
from helpers.model import DECODERS, tiny_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.recompute import ATTENTION_OPS, GEMM_OPS, SAVE_POLICIES, SavePolicy, recomputed

GQA = {"num_kv_attention_heads": 2}
PACKED, DENSE = (15, 10), None


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def inputs_of(lengths: tuple[int, ...] | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    if lengths is None:
        return {
            "inputs": torch.randint(97, (2, 12), generator=generator),
            "position_ids": torch.arange(12).expand(2, -1),
        }
    return {
        "inputs": torch.randint(97, (1, sum(lengths)), generator=generator),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "varlen": VarlenMetadata.of(lengths),
    }


def loss_and_gradients(model: nn.Module, lengths: tuple[int, ...] | None) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model.logits(model(**inputs_of(lengths))).float().square().mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("policy", ["matmuls", "attention", "nothing"])
@pytest.mark.parametrize("lengths", [PACKED, DENSE], ids=["packed", "dense"])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
@pytest.mark.parametrize("model_type", DECODERS)
def test_no_policy_changes_a_bit(
    model_type: str, dtype: str, lengths: tuple[int, ...] | None, policy: SavePolicy
) -> None:
    """The same operators on the same values: equal, not close."""
    keys = {**GQA, "dtype": dtype, "sliding_window": 5}
    expected = loss_and_gradients(tiny_model(model_type, **keys), lengths)
    found = loss_and_gradients(tiny_model(model_type, checkpoint=1.0, checkpoint_save_policy=policy, **keys), lengths)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("changes", [{"qk_norm": True}, {"residual_in_fp32": True}, {"norm_type": "layernorm"}])
@pytest.mark.parametrize("policy", ["matmuls", "attention"])
def test_no_policy_changes_a_bit_of_other_layers(policy: SavePolicy, changes: dict[str, Any]) -> None:
    keys = {**GQA, "dtype": "torch.bfloat16", **changes}
    expected = loss_and_gradients(tiny_model("INTERNLM2", **keys), PACKED)
    found = loss_and_gradients(tiny_model("INTERNLM2", checkpoint=0.5, checkpoint_save_policy=policy, **keys), PACKED)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("policy", SAVE_POLICIES)
def test_backward_runs_again_what_is_not_saved_and_nothing_else(policy: SavePolicy) -> None:
    layers = 3
    with Operators() as plain:
        loss_and_gradients(tiny_model("LLAMA2", num_layers=layers, **GQA), PACKED)
    share = {} if policy == "everything" else {"checkpoint": 1.0, "checkpoint_save_policy": policy}
    with Operators() as run:
        loss_and_gradients(tiny_model("LLAMA2", num_layers=layers, **GQA, **share), PACKED)
    again = {name: count - plain.counts[name] for name, count in run.counts.items() if count > plain.counts[name]}
    attention = sum(again.pop(name, 0) for name in ATTENTION_OPS)
    products = sum(again.pop(name, 0) for name in GEMM_OPS)
    # A layer has seven products, of which the last (w2) is never needed again: only its input is.
    expected = {"everything": (0, 0), "matmuls": (0, 0), "attention": (0, 6), "nothing": (1, 6)}[policy]
    assert (attention, products) == tuple(layers * number for number in expected)
    assert bool(again) == (policy != "everything"), "norms and activations run again"


def test_without_gradients_nothing_is_kept() -> None:
    model = tiny_model("INTERNLM2", checkpoint=1.0, checkpoint_save_policy="matmuls", num_layers=2)
    model(**inputs_of(DENSE))
    with torch.no_grad(), PeakMemory() as memory:
        hidden = model(**inputs_of(DENSE))
        assert memory.live == hidden.nbytes


def test_keeping_ends_with_the_backward_pass() -> None:
    model = tiny_model("INTERNLM2", checkpoint=1.0, checkpoint_save_policy="matmuls")
    loss_and_gradients(model, PACKED)
    with PeakMemory() as memory:
        loss_and_gradients(model, PACKED)
        assert memory.live == sum(parameter.nbytes for parameter in model.parameters())


def test_some_layers_may_save_more_than_others() -> None:
    saves: tuple[SavePolicy, ...] = ("nothing", "attention", "matmuls", "everything")
    expected = loss_and_gradients(tiny_model("INTERNLM2", num_layers=4), PACKED)
    model = tiny_model("INTERNLM2", num_layers=4)
    for layer, policy in zip(model.layers.values(), saves, strict=True):
        layer.save_policy = policy
    with Operators() as operators:
        found = loss_and_gradients(model, PACKED)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert operators.counts["internlm::cpu_attention"] == 4 + 1


def two_products(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.tanh(torch.tanh(x @ first) @ second)


def gradients_of(call: Callable[..., Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, *weights = (torch.randn(8, 8, generator=generator).requires_grad_() for _ in range(3))
    call(x, *weights).square().sum().backward()
    return [tensor.grad for tensor in (x, *weights) if tensor.grad is not None]


@pytest.mark.parametrize(("policy", "again"), [("everything", 0), ("matmuls", 0), ("attention", 2), ("nothing", 2)])
def test_a_compiler_follows_the_policy(policy: SavePolicy, again: int) -> None:
    products = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        products.append(sum(node.target is torch.ops.aten.mm.default for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    found = gradients_of(torch.compile(recomputed(two_products, policy), backend=backend, fullgraph=True))
    assert products == [2, 4 + again]
    # The same operators, but for those of tanh's derivative: a few roundings of fp32.
    torch.testing.assert_close(found, gradients_of(two_products), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", SAVE_POLICIES)
def test_a_compiled_function_may_be_recomputed(policy: SavePolicy) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(two_products, backend="aot_eager", fullgraph=True)
    found = gradients_of(recomputed(compiled, policy))
    torch.testing.assert_close(found, gradients_of(two_products), rtol=1e-5, atol=1e-5)
