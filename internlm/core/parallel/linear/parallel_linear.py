"""Linear layers of the parallel modes: layers that share an input exchange it once, forward and backward.

A mode gives each group of layers an `InputExchange` (how the input is gathered and its gradient reduced), a
`WeightStore` (where full weights come from and where their gradients go) and `LinearKernels` (the dtype of its GEMMs).
All that happens to a group in a step is in `_LinearGroupFunction`. Shapes: T tokens of this rank (or `[B, S]`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from internlm.core.communication.pending import Pending
from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.parallel.parameter_events import deliver_gradient
from internlm.model.ops.float8.scaled_gemm import as_scaled
from internlm.model.ops.linear_kernels import LinearKernels, Operand
from internlm.model.recompute import as_gemm_operator, as_recomputed_operator
from internlm.model.roles import Role

T = TypeVar("T")


class InputExchange:
    """No exchange: this rank has the full input and keeps its gradient."""

    saves_gathered: bool = True
    """Whether the gathered input is saved for backward; otherwise it is gathered a second time."""

    def gather(self, x: Tensor) -> Tensor:
        """This rank's part of the input -> the input of the GEMMs."""
        return x

    def start_gather(self, x: Tensor) -> Pending:
        """`gather`, asynchronously."""
        return Pending(x)

    def start_reduce(self, grad: Tensor) -> Pending:
        """Gradient of the input of the GEMMs (overwritten) -> gradient of this rank's part of the input."""
        return Pending(grad)


class WeightStore(Protocol):
    """Where full weights come from, and where their gradients go."""

    def acquire(self, group: LinearGroup, parameters: Sequence[nn.Parameter], *, backward: bool) -> Sequence[Operand]:
        """The full weights and biases, in the order of `parameters`."""

    def release(self, group: LinearGroup) -> None:
        """The full weights are no longer needed."""

    def deliver(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        """Take the gradient of a full weight; a returned tensor is for autograd to accumulate at once."""


class LocalWeights:
    """A rank uses the weights that it holds, or that FSDP has gathered for it."""

    def acquire(self, group: LinearGroup, parameters: Sequence[nn.Parameter], *, backward: bool) -> Sequence[Operand]:
        return [as_scaled(parameter) for parameter in parameters]

    def release(self, group: LinearGroup) -> None:
        pass

    def deliver(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        return gradient


class LinearShard(NamedTuple):
    """A weight `[out, in]` and its bias `[out]`."""

    weight: nn.Parameter
    bias: nn.Parameter | None


class ParallelLinear(nn.Module):
    """One linear layer as this rank computes it.

    Args:
        parameters: attribute -> local parameter: "weight", "bias", and "kv_weight", "kv_bias" where queries and
            key-values are held apart; their outputs are joined.
        role: of the layer.
        finish_output: applied to the output before the bias, which is then added once instead of on every rank; None:
            the output is final.

    Attributes:
        group: layers that are computed together, this one among them. Called alone, a layer computes its whole group.
    """

    bias: nn.Parameter | None
    group: LinearGroup

    def __init__(
        self, parameters: dict[str, nn.Parameter], role: Role, finish_output: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        # A layer without bias has the attribute all the same, as nn.Linear does.
        for name, parameter in {**parameters, "bias": parameters.get("bias")}.items():
            self.register_parameter(name, parameter)
        self.role = role
        self.finish_output = finish_output

    def shards(self) -> list[LinearShard]:
        """The weights that the input is multiplied with."""
        biases = {} if self.finish_output is not None else dict(self.named_parameters(recurse=False))
        return [
            LinearShard(weight, biases.get(name.replace("weight", "bias")))
            for name, weight in self.named_parameters(recurse=False)
            if name.endswith("weight")
        ]

    def forward(self, x: Tensor) -> Tensor:
        """This rank's part of the input -> its part of the output."""
        out = self.group(x)[self.group.layers.index(self)]
        if self.finish_output is None:
            return out
        out = self.finish_output(out)
        return out if self.bias is None else out + self.bias


class ParallelGroupedLinear(nn.Module):
    """In the place of a `GroupedLinear` whose layers are parallel."""

    def __init__(self, group: LinearGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """This rank's part of the input -> its part of each layer's output."""
        return self.group(x)


class LinearGroup:
    """Layers that are computed together from one input.

    Attributes:
        name: that of the first layer, for messages.
        role: that of the first layer.
        layers: in the order of the outputs.
        exchange: of the input.
        weights: see `WeightStore`.
        weight_gradients: queue of weight gradients that are computed later.
        kernels: of the GEMMs; None: in the dtype of the weights.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[ParallelLinear],
        exchange: InputExchange,
        weights: WeightStore,
        weight_gradients: WeightGradients,
        kernels: LinearKernels | None = None,
    ) -> None:
        self.name = name
        self.role = layers[0].role
        self.layers = list(layers)
        self.exchange = exchange
        self.weights = weights
        self.weight_gradients = weight_gradients
        self.kernels = kernels or LinearKernels()
        for layer in layers:
            layer.group = self

    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases, in the order in which a `WeightStore` gets them."""
        return [p for layer in self.layers for shard in layer.shards() for p in shard if p is not None]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[..., in]` -> `[..., out]` of each layer, before `finish_output`."""
        parameters: list[nn.Parameter] = []
        slots: list[_Slot] = []
        for number, layer in enumerate(self.layers):
            for weight, bias in layer.shards():
                slots.append(_Slot(number, len(parameters), None if bias is None else len(parameters) + 1))
                parameters += [weight] if bias is None else [weight, bias]
        outputs = _LinearGroupFunction.apply(self, tuple(slots), x, *parameters)
        by_layer = _by_layer(slots, outputs)
        return tuple(own[0] if len(own) == 1 else torch.cat(own, dim=-1) for own in by_layer)


class _Slot(NamedTuple):
    """Position of a shard's weight and bias among the flat parameters of a group, and the number of its layer."""

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
        # An output that nothing depends on has no gradient, as on one device, and its weight counts as unused.
        ctx.set_materialize_grads(False)
        exchange, kernels = group.exchange, group.kernels
        gathered = exchange.gather(x) if exchange.saves_gathered else None
        operands: list[Operand] = []

        def run_gemms() -> list[Tensor]:
            full_input = exchange.gather(x) if gathered is None else gathered
            full = group.weights.acquire(group, parameters, backward=False)
            scales = kernels.compute_scales(full_input, _by_layer(slots, [full[slot.weight] for slot in slots]))
            operands.append(kernels.quantize_input(full_input, scales))
            outputs = []
            for slot in slots:
                bias = None if slot.bias is None else full[slot.bias]
                assert bias is None or isinstance(bias, Tensor)
                weight = kernels.quantize_weight(full[slot.weight], scales, slot.layer)
                outputs.append(kernels.output(operands[0], weight, bias))
            group.weights.release(group)
            return outputs if scales is None else [*outputs, scales]

        outputs = as_gemm_operator(run_gemms, x)
        scales = outputs.pop() if kernels.is_float8 else None
        saved = x if gathered is None else gathered
        if gathered is not None and kernels.is_float8:

            def quantized() -> list[Tensor]:
                # Recomputation that has the outputs at hand ran no GEMM: it only quantizes the input again.
                operand = operands[0] if operands else kernels.quantize_input(gathered, scales)
                return [kernels.saved_input(operand)]

            (saved,) = as_recomputed_operator(quantized, x)
        # Parameters are leaves: kept as they are, as recomputation would return bare copies of saved ones.
        ctx.group, ctx.slots, ctx.parameters = group, slots, parameters
        ctx.save_for_backward(saved, scales)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        group: LinearGroup = ctx.group
        kernels, exchange = group.kernels, group.exchange
        parameters: tuple[nn.Parameter, ...] = ctx.parameters
        saved, scales = ctx.saved_tensors
        gathering = Pending(saved) if exchange.saves_gathered else exchange.start_gather(saved)
        used = [(slot, grad) for slot, grad in zip(ctx.slots, grads, strict=True) if grad is not None]
        slots = [slot for slot, _ in used]
        operands = list(chain(*kernels.quantize_gradients(_by_layer(slots, [grad for _, grad in used]))))
        grad_x = None
        reducing: Pending | None = None
        if ctx.needs_input_grad[2]:
            full = group.weights.acquire(group, parameters, backward=True)
            for slot, operand in zip(slots, operands, strict=True):
                weight = kernels.quantize_weight(full[slot.weight], scales, slot.layer)
                contribution = kernels.input_gradient(operand, weight)
                grad_x = contribution if grad_x is None else grad_x.add_(contribution)
            group.weights.release(group)
            assert grad_x is not None
            reducing = exchange.start_reduce(grad_x)
        gathered = gathering.wait()
        x = (kernels.restore_input if exchange.saves_gathered else kernels.quantize_input)(gathered, scales)

        results: list[Tensor | None] = [None] * len(parameters)
        for (slot, grad), operand in zip(used, operands, strict=True):
            for place, compute in (
                (slot.weight, partial(kernels.weight_gradient, operand, x)),
                (slot.bias, partial(_bias_gradient, grad)),
            ):
                if place is None or not parameters[place].requires_grad:
                    continue
                if group.weight_gradients.is_postponing:
                    group.weight_gradients.compute(partial(_compute_later, group.weights, parameters[place], compute))
                else:
                    results[place] = group.weights.deliver(parameters[place], compute())
        return None, None, None if reducing is None else reducing.wait(), *results


def _bias_gradient(grad: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0)


def _compute_later(weights: WeightStore, parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None:
    gradient = weights.deliver(parameter, compute())
    if gradient is not None:
        deliver_gradient(parameter, gradient)
