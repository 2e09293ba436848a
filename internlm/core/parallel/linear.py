"""Linear layers of the parallel modes: layers that share an input make one exchange, forward and backward.

A mode gives each group of layers an `InputExchange` (how the input becomes whole and its gradient is shared out) and a
`WeightStore` (how weights become whole, and where their gradients go). Shapes: T tokens of this rank (or `[B, S]`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.communication.exchange import Pending, Ready
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.core.parallel.weight_gradients import WeightGradients
from internlm.model.recompute import as_products
from internlm.model.roles import Role


class InputExchange:
    """The input of a group of layers is there already; its gradient stays here."""

    saves_gathered: bool = True
    """Whether what `gather` gave is kept for backward; otherwise it is gathered again."""

    def gather(self, x: Tensor) -> Tensor:
        """This rank's part of the input -> what the layers multiply."""
        return x

    def start_gather(self, x: Tensor) -> Pending:
        """As `gather`, in the background."""
        return Ready(x)

    def start_reduce(self, grad: Tensor) -> Pending:
        """Gradient of what the layers multiplied (overwritten) -> gradient of this rank's part of the input."""
        return Ready(grad)


class WeightStore(Protocol):
    """Where whole weights come from, and where their gradients go."""

    def take(self, group: LinearGroup, parameters: Sequence[nn.Parameter], *, backward: bool) -> list[Tensor]:
        """The weights and biases as the layers multiply them, in the order of `parameters`."""

    def give_back(self, group: LinearGroup, whole: list[Tensor]) -> None:
        """The whole weights are no longer needed."""

    def hand_over(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        """Take the gradient of a whole weight; what is returned is for autograd to accumulate at once."""


class LocalWeights:
    """Every rank multiplies what it holds."""

    def take(self, group: LinearGroup, parameters: Sequence[nn.Parameter], *, backward: bool) -> list[Tensor]:
        return list(parameters)

    def give_back(self, group: LinearGroup, whole: list[Tensor]) -> None:
        pass

    def hand_over(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        return gradient


class LinearExchanges(Protocol):
    """What a linear layer asks of its mode; see `ModelParallel`."""

    adds_bias_after_reduction: ClassVar[bool]

    def prepare_input(self, role: Role, x: Tensor) -> Tensor:
        """Called with the input of each linear layer."""

    def finish_output(self, role: Role, out: Tensor) -> Tensor:
        """Called with the output of each linear layer, before a bias that is added last."""


class LinearPart(NamedTuple):
    """A weight `[out, in]` and its bias `[out]`."""

    weight: nn.Parameter
    bias: nn.Parameter | None


class ParallelLinear(nn.Module):
    """One linear layer as this rank computes it.

    Args:
        parameters: attribute -> local parameter: "weight", "bias", and "kv_weight", "kv_bias" where queries and
            key-values are held apart; their outputs are joined.
        role: of the layer.
        parallel: the mode.
    """

    bias: nn.Parameter | None

    def __init__(self, parameters: dict[str, nn.Parameter], role: Role, parallel: LinearExchanges) -> None:
        super().__init__()
        # A layer without bias has the attribute all the same, as nn.Linear does.
        for name, parameter in {**parameters, "bias": parameters.get("bias")}.items():
            self.register_parameter(name, parameter)
        self.role = role
        self.parallel = parallel
        self.adds_bias_last = parallel.adds_bias_after_reduction and role in (Role.ROW, Role.ATTENTION_OUT)
        self.group: LinearGroup | None = None

    def parts(self) -> list[LinearPart]:
        """What is multiplied with the input."""
        biases = {} if self.adds_bias_last else dict(self.named_parameters(recurse=False))
        return [
            LinearPart(weight, biases.get(name.replace("weight", "bias")))
            for name, weight in self.named_parameters(recurse=False)
            if name.endswith("weight")
        ]

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        assert self.group is not None
        out = self.group.output_of(self, self.parallel.prepare_input(self.role, x))
        out = self.parallel.finish_output(self.role, out)
        return out + self.bias if self.adds_bias_last and self.bias is not None else out


class LinearGroup:
    """Layers of one parent module that are called with the same tensor; the first call computes for all of them.

    Args:
        name: for messages and for the order of weight gathers: that of the first layer.
        layers: in the order of the model.
        exchange: of their input.
        weights: see `WeightStore`.
        weight_gradients: where weight gradients wait that are asked for later.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[ParallelLinear],
        exchange: InputExchange,
        weights: WeightStore,
        weight_gradients: WeightGradients,
    ) -> None:
        self.name = name
        self.role = layers[0].role
        self.exchange = exchange
        self.weights = weights
        self.weight_gradients = weight_gradients
        self._layers = list(layers)
        self._x: Tensor | None = None
        self._outputs: dict[ParallelLinear, Tensor] = {}
        for layer in layers:
            layer.group = self

    def output_of(self, layer: ParallelLinear, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]` of one of the layers."""
        if x is not self._x or layer not in self._outputs:
            self._x, self._outputs = x, self._compute(x)
        output = self._outputs.pop(layer)
        if not self._outputs:
            self._x = None
        return output

    def _compute(self, x: Tensor) -> dict[ParallelLinear, Tensor]:
        parts = [layer.parts() for layer in self._layers]
        # The slots say which of the flat parameters are the weight and bias of each part.
        parameters: list[nn.Parameter] = []
        slots: list[tuple[int, int | None]] = []
        for part in (part for own in parts for part in own):
            slots.append((len(parameters), None if part.bias is None else len(parameters) + 1))
            parameters += [part.weight] if part.bias is None else [part.weight, part.bias]
        outputs = iter(_LinearGroupFunction.apply(self, tuple(slots), x, *parameters))
        result = {}
        for layer, own in zip(self._layers, parts, strict=True):
            mine = [next(outputs) for _ in own]
            result[layer] = mine[0] if len(mine) == 1 else torch.cat(mine, dim=-1)
        return result


class _LinearGroupFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: LinearGroup, slots: tuple[tuple[int, int | None], ...], x: Tensor, *parameters: nn.Parameter
    ) -> tuple[Tensor, ...]:
        exchange = group.exchange
        kept = exchange.gather(x) if exchange.saves_gathered else x

        def multiply() -> list[Tensor]:
            gathered = kept if exchange.saves_gathered else exchange.gather(x)
            whole = group.weights.take(group, parameters, backward=False)
            outputs = [F.linear(gathered, whole[w], None if b is None else whole[b]) for w, b in slots]
            group.weights.give_back(group, whole)
            return outputs

        # Parameters are leaves: they are kept as they are, as recomputation would give back bare copies of saved ones.
        ctx.group, ctx.slots, ctx.parameters = group, slots, parameters
        ctx.save_for_backward(kept)
        return tuple(as_products(multiply, x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        group: LinearGroup = ctx.group
        parameters: tuple[nn.Parameter, ...] = ctx.parameters
        (saved,) = ctx.saved_tensors
        gathering = Ready(saved) if group.exchange.saves_gathered else group.exchange.start_gather(saved)
        grad_x = None
        reducing: Pending | None = None
        if ctx.needs_input_grad[2]:
            whole = group.weights.take(group, parameters, backward=True)
            for (w, _), grad in zip(ctx.slots, grads, strict=True):
                if grad is not None:
                    contribution = grad @ whole[w]
                    grad_x = contribution if grad_x is None else grad_x.add_(contribution)
            group.weights.give_back(group, whole)
            assert grad_x is not None
            reducing = group.exchange.start_reduce(grad_x)
        gathered = gathering.wait()

        results: list[Tensor | None] = [None] * len(parameters)
        for (w, b), grad in zip(ctx.slots, grads, strict=True):
            if grad is None:
                continue
            for slot, compute in ((w, _weight_gradient), (b, _bias_gradient)):
                if slot is None or not parameters[slot].requires_grad:
                    continue
                if group.weight_gradients.is_postponing:
                    group.weight_gradients.compute(
                        partial(_compute_later, group.weights, parameters[slot], compute, grad, gathered)
                    )
                else:
                    results[slot] = group.weights.hand_over(parameters[slot], compute(grad, gathered))
        return None, None, None if reducing is None else reducing.wait(), *results


def _weight_gradient(grad: Tensor, gathered: Tensor) -> Tensor:
    return grad.flatten(0, -2).t() @ gathered.flatten(0, -2)


def _bias_gradient(grad: Tensor, gathered: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0)


def _compute_later(weights: WeightStore, parameter: nn.Parameter, compute: Any, grad: Tensor, gathered: Tensor) -> None:
    gradient = weights.hand_over(parameter, compute(grad, gathered))
    if gradient is not None:
        deliver_gradient(parameter, gradient)
