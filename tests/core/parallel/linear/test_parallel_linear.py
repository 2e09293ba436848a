"""Groups of linear layers: what they compute, in which order, and how often they exchange."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from torch import Tensor, nn

from internlm.core.communication.pending import NO_TIMEOUT, Pending
from internlm.core.parallel.linear.parallel_linear import InputExchange, LinearGroup, LocalWeights, ParallelLinear
from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.model.roles import Role


class Noted(Pending):
    """A tensor on its way, noted when it is waited for."""

    def __init__(self, log: list[str], name: str, tensor: Tensor) -> None:
        super().__init__(tensor)
        self.log, self.name = log, name

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> Tensor:
        self.log.append(f"wait {self.name}")
        return super().wait(timeout)


class LoggedExchange(InputExchange):
    """fsp's order of events without ranks."""

    saves_gathered = False

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def gather(self, x: Tensor) -> Tensor:
        self.log.append("gather")
        return x.clone()

    def start_gather(self, x: Tensor) -> Pending:
        self.log.append("start gather")
        return Noted(self.log, "gather", x.clone())

    def start_reduce(self, grad: Tensor) -> Pending:
        self.log.append("start reduce")
        return Noted(self.log, "reduce", grad)


class LoggedWeights(LocalWeights):
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def acquire(self, group: LinearGroup, parameters: Sequence[nn.Parameter], *, backward: bool) -> list[Tensor]:
        self.log.append("input gradient" if backward else "multiply")
        return super().acquire(group, parameters, backward=backward)

    def deliver(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        self.log.append("weight gradient")
        return super().deliver(parameter, gradient)


def make_group(log: list[str], weight_gradients: WeightGradients) -> tuple[list[ParallelLinear], list[nn.Linear]]:
    """Two layers that share an input, one with a bias, and the same as plain layers."""
    plain = [nn.Linear(5, 7, bias=False), nn.Linear(5, 3)]
    layers = [
        ParallelLinear(
            {name: nn.Parameter(p.detach().clone()) for name, p in linear.named_parameters()}, Role.COLUMN, None
        )
        for linear in plain
    ]
    LinearGroup("group", layers, LoggedExchange(log), LoggedWeights(log), weight_gradients)
    return layers, plain


def run(layers: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    outputs = list(layers[0].group(x)) if isinstance(layers[0], ParallelLinear) else [layer(x) for layer in layers]
    torch.cat([output.flatten() * (number + 1) for number, output in enumerate(outputs)]).square().sum().backward()
    gradients = [p.grad for layer in layers for p in layer.parameters() if p.grad is not None]
    assert x.grad is not None
    return torch.cat([output.detach().flatten() for output in outputs]), [x.grad, *gradients]


def test_exchanges_hide_behind_the_computing_of_gradients() -> None:
    log: list[str] = []
    layers, plain = make_group(log, WeightGradients())
    x = torch.randn(2, 4, 5)
    output, gradients = run(layers, x)
    expected, expected_gradients = run(plain, x)
    assert torch.equal(output, expected)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other)
    # One exchange forward and two backward for both layers; the gather is under way while the gradient of the input is
    # computed, and its sum while those of the weights are.
    assert log == [
        "gather",
        "multiply",
        "start gather",
        "input gradient",
        "start reduce",
        "wait gather",
        *["weight gradient"] * 3,
        "wait reduce",
    ]


def test_weight_gradients_can_wait() -> None:
    later = WeightGradients()
    layers, plain = make_group([], later)
    x = torch.randn(2, 4, 5)
    with later.postpone("a"):
        _, gradients = run(layers, x)
    assert len(gradients) == 1, "no weight has a gradient yet"
    with pytest.raises(RuntimeError, match="never computed"):
        later.check_empty()
    with torch.no_grad():
        later.run("a")
    later.finish()
    later.check_empty()
    _, expected = run(plain, x)
    for parameter, other in zip((p for layer in layers for p in layer.parameters()), expected[1:], strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, other)


def test_a_layer_called_alone_or_twice_still_computes() -> None:
    layers, plain = make_group([], WeightGradients())
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(layers[0](x), plain[0](x))
    assert torch.equal(layers[0](x), plain[0](x))
    assert torch.equal(layers[1](y), plain[1](y))
    assert torch.equal(layers[1](x), plain[1](x))


@pytest.mark.parametrize("unused", range(3))
def test_an_output_without_gradient_takes_none_from_the_others(unused: int) -> None:
    plain = [nn.Linear(5, size) for size in (7, 3, 4)]
    layers = [
        ParallelLinear({n: nn.Parameter(p.detach().clone()) for n, p in one.named_parameters()}, Role.COLUMN, None)
        for one in plain
    ]
    group = LinearGroup("group", layers, InputExchange(), LocalWeights(), WeightGradients())
    x = torch.randn(2, 4, 5)
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    for outputs in (group(found), [layer(expected) for layer in plain]):
        sum(output.square().sum() for number, output in enumerate(outputs) if number != unused).backward()
    torch.testing.assert_close(found.grad, expected.grad)
    for number, (layer, other) in enumerate(zip(layers, plain, strict=True)):
        for name, parameter in other.named_parameters():
            gradient = layer.get_parameter(name).grad
            if number == unused:
                assert gradient is None or not gradient.any()
            else:
                torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("is_postponed", [False, True])
def test_no_gradient_of_a_frozen_weight_is_computed(is_postponed: bool) -> None:
    log: list[str] = []
    later = WeightGradients()
    layers, _ = make_group(log, later)
    layers[0].weight.requires_grad_(False)
    with later.postpone("a") if is_postponed else nullcontext():
        run(layers, torch.randn(2, 4, 5))
    if is_postponed:
        with torch.no_grad():
            later.run("a")
        later.finish()
    assert log.count("weight gradient") == 2
    assert layers[0].weight.grad is None and layers[1].weight.grad is not None
