"""Linear layers of the parallel modes: layers that share an input make one exchange, forward and backward.

A mode gives each group of layers an `InputExchange` (how the input becomes whole and its gradient is shared out) and a
`WeightStore` (how weights become whole, and where their gradients go). Shapes: T tokens of this rank (or `[B, S]`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, groupby
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from internlm.core.communication.pending import Pending
from internlm.core.parallel.linear.kernels import Operand, Products
from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.model.ops.float8.scaled_gemm import as_scaled
from internlm.model.recompute import as_products, as_unkept
from internlm.model.roles import Role

T = TypeVar("T")


class InputExchange:
    """The input of a group of layers is there already; its gradient stays here."""

    saves_gathered: bool = True
    """Whether what `gather` gave is kept for backward; otherwise it is gathered again."""

    def gather(self, x: Tensor) -> Tensor:
        """This rank's part of the input -> what the layers multiply."""
        return x

    def start_gather(self, x: Tensor) -> Pending:
        """As `gather`, in the background."""
        return Pending(x)

    def start_reduce(self, grad: Tensor) -> Pending:
        """Gradient of what the layers multiplied (overwritten) -> gradient of this rank's part of the input."""
        return Pending(grad)


class WeightStore(Protocol):
    """Where whole weights come from, and where their gradients go."""

    def take(self, group: LinearGroup, parameters: Sequence[nn.Parameter], *, backward: bool) -> Sequence[Operand]:
        """The weights and biases as the layers multiply them, in the order of `parameters`."""

    def give_back(self, group: LinearGroup, whole: Sequence[Operand]) -> None:
        """The whole weights are no longer needed."""

    def hand_over(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        """Take the gradient of a whole weight; what is returned is for autograd to accumulate at once."""


class LocalWeights:
    """Every rank multiplies what it holds, or what FSDP has gathered for it."""

    def take(self, group: LinearGroup, parameters: Sequence[nn.Parameter], *, backward: bool) -> Sequence[Operand]:
        return [as_scaled(parameter) for parameter in parameters]

    def give_back(self, group: LinearGroup, whole: Sequence[Operand]) -> None:
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
        products: how they multiply; None: in the dtype of the weights.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[ParallelLinear],
        exchange: InputExchange,
        weights: WeightStore,
        weight_gradients: WeightGradients,
        products: Products | None = None,
    ) -> None:
        self.name = name
        self.role = layers[0].role
        self.exchange = exchange
        self.weights = weights
        self.weight_gradients = weight_gradients
        self.products = products or Products()
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
        parameters: list[nn.Parameter] = []
        slots: list[_Slot] = []
        for number, own in enumerate(parts):
            for part in own:
                slots.append(_Slot(number, len(parameters), None if part.bias is None else len(parameters) + 1))
                parameters += [part.weight] if part.bias is None else [part.weight, part.bias]
        outputs = iter(_LinearGroupFunction.apply(self, tuple(slots), x, *parameters))
        result = {}
        for layer, own in zip(self._layers, parts, strict=True):
            mine = [next(outputs) for _ in own]
            result[layer] = mine[0] if len(mine) == 1 else torch.cat(mine, dim=-1)
        return result


class _Slot(NamedTuple):
    """Which of the flat parameters of a group are the weight and the bias of a part, and of which layer it is one."""

    layer: int
    weight: int
    bias: int | None


def _by_layer(slots: Sequence[_Slot], values: Sequence[T]) -> list[list[T]]:
    """One value a slot -> those of each layer."""
    grouped = groupby(zip(slots, values, strict=True), key=lambda entry: entry[0].layer)
    return [[value for _, value in own] for _, own in grouped]


class _LinearGroupFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: LinearGroup, slots: tuple[_Slot, ...], x: Tensor, *parameters: nn.Parameter
    ) -> tuple[Tensor, ...]:
        exchange, products = group.exchange, group.products
        gathered = exchange.gather(x) if exchange.saves_gathered else None
        multiplied: list[Operand] = []

        def multiply() -> list[Tensor]:
            own = exchange.gather(x) if gathered is None else gathered
            whole = group.weights.take(group, parameters, backward=False)
            scales = products.scales(own, _by_layer(slots, [whole[slot.weight] for slot in slots]))
            multiplied.append(products.input(own, scales))
            outputs = []
            for slot in slots:
                bias = None if slot.bias is None else whole[slot.bias]
                assert bias is None or isinstance(bias, Tensor)
                weight = products.weight(whole[slot.weight], scales, slot.layer)
                outputs.append(products.output(multiplied[0], weight, bias))
            group.weights.give_back(group, whole)
            return outputs if scales is None else [*outputs, scales]

        outputs = as_products(multiply, x)
        scales = outputs.pop() if products.is_float8 else None
        kept = x if gathered is None else gathered
        if gathered is not None and products.is_float8:

            def keep() -> list[Tensor]:
                # Recomputation that has the products at hand did not multiply: it only rounds the input again.
                return [products.kept(multiplied[0] if multiplied else products.input(gathered, scales))]

            (kept,) = as_unkept(keep, x)
        # Parameters are leaves: they are kept as they are, as recomputation would give back bare copies of saved ones.
        ctx.group, ctx.slots, ctx.parameters = group, slots, parameters
        ctx.save_for_backward(kept, scales)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        group: LinearGroup = ctx.group
        products, exchange = group.products, group.exchange
        parameters: tuple[nn.Parameter, ...] = ctx.parameters
        saved, scales = ctx.saved_tensors
        gathering = Pending(saved) if exchange.saves_gathered else exchange.start_gather(saved)
        used = [(slot, grad) for slot, grad in zip(ctx.slots, grads, strict=True) if grad is not None]
        slots = [slot for slot, _ in used]
        operands = list(chain(*products.gradients(_by_layer(slots, [grad for _, grad in used]))))
        grad_x = None
        reducing: Pending | None = None
        if ctx.needs_input_grad[2]:
            whole = group.weights.take(group, parameters, backward=True)
            for slot, operand in zip(slots, operands, strict=True):
                weight = products.weight(whole[slot.weight], scales, slot.layer)
                contribution = products.input_gradient(operand, weight)
                grad_x = contribution if grad_x is None else grad_x.add_(contribution)
            group.weights.give_back(group, whole)
            assert grad_x is not None
            reducing = exchange.start_reduce(grad_x)
        gathered = gathering.wait()
        x = (products.kept_input if exchange.saves_gathered else products.input)(gathered, scales)

        results: list[Tensor | None] = [None] * len(parameters)
        for (slot, grad), operand in zip(used, operands, strict=True):
            for place, compute in (
                (slot.weight, partial(products.weight_gradient, operand, x)),
                (slot.bias, partial(_bias_gradient, grad)),
            ):
                if place is None or not parameters[place].requires_grad:
                    continue
                if group.weight_gradients.is_postponing:
                    group.weight_gradients.compute(partial(_compute_later, group.weights, parameters[place], compute))
                else:
                    results[place] = group.weights.hand_over(parameters[place], compute())
        return None, None, None if reducing is None else reducing.wait(), *results


def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0)


def _compute_later(weights: WeightStore, parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None:
    gradient = weights.hand_over(parameter, compute())
    if gradient is not None:
        deliver_gradient(parameter, gradient)
