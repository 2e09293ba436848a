"""Initial values of a Hugging Face class: the ones that its own `_init_weights` draws.

A class says how it is initialised in code, not in data. So the code runs once on the meta device while every operator
that writes to a parameter is recorded; a parameter whose values are independent of each other is then filled by running
its operators on any part of it. Others (rows of zeros for a padding token, ranges, orthogonal matrices) are drawn as a
whole, by running the code on the CPU for the module that holds them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from internlm.model.initialization import set_initializer
from internlm.utils.errors import ConfigError

_RANDOM = ("aten::normal_", "aten::uniform_")
_ELEMENTWISE = frozenset(
    {*_RANDOM, "aten::fill_.Scalar", "aten::zero_", "aten::mul_.Scalar", "aten::mul_.Tensor", "aten::add_.Scalar"}
    | {"aten::add_.Tensor", "aten::div_.Tensor", "aten::sub_.Tensor", "aten::erfinv_", "aten::clamp_", "aten::log_"}
    | {"aten::exp_", "aten::neg_"}
)
"""Operators after which the elements of a tensor are still independent of each other."""


class _Write(NamedTuple):
    """One operator that wrote to a parameter, and its arguments other than the parameter: numbers."""

    operator: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass(frozen=True)
class RecordedValues:
    """The distribution that a sequence of elementwise operators leaves behind."""

    writes: tuple[_Write, ...]

    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            for operator, arguments, keywords in self.writes:
                is_random = operator.name().split(".")[0] in _RANDOM  # type: ignore[attr-defined]
                operator(tensor, *arguments, **(keywords | {"generator": generator} if is_random else keywords))


@dataclass(frozen=True)
class WholeValues:
    """The values that a class gives to a whole parameter; `fill` takes a tensor of its shape only.

    Attributes:
        module: a meta module below which everything is that decides the values.
        owner: the `PreTrainedModel` that initialises it.
        path: name of the parameter in `module`.
    """

    module: nn.Module
    owner: nn.Module
    path: str
    draws_whole: bool = True

    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        """Raises ConfigError if the class leaves a value undefined."""
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            module = _materialized_copy(self.module)
            _forget_initialized(module)
            torch.manual_seed(0 if generator is None else generator.initial_seed())
            for part, owner in _in_order(module, self.owner):
                owner._init_weights(part)  # type: ignore[operator]
            values = module.get_parameter(self.path)
            if not torch.isfinite(values).all():
                raise ConfigError(
                    f"{type(self.owner).__name__}._init_weights leaves values of '{self.path}' in a "
                    f"{type(self.module).__name__} undefined; complete it"
                )
            tensor.copy_(values)


@dataclass(frozen=True)
class FixedValues:
    """The same values in every run; `fill` takes a tensor of their shape only."""

    values: Tensor
    draws_whole: bool = True

    def fill(self, tensor: Tensor, generator: torch.Generator | None = None) -> None:
        with torch.no_grad():
            tensor.copy_(self.values)


def attach_initial_values(model: nn.Module, constructed: Mapping[nn.Parameter, Tensor]) -> None:
    """Give every parameter of a Hugging Face model on the meta device the initializer that its class defines.

    Args:
        model: a `PreTrainedModel` whose parameters are on the meta device; its weights are not yet tied, as when
            transformers initialises it.
        constructed: values that the constructor gave to small parameters; kept where `_init_weights` writes nothing.

    Raises:
        ConfigError: the class leaves a parameter undefined.
    """
    _forget_initialized(model)
    record = _Record(model)
    with torch.no_grad(), record:
        for module, owner in _in_order(model, model):
            record.module = module, owner
            owner._init_weights(module)  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        writes, last = record.writes.get(parameter, []), record.last.get(parameter)
        if last is None:
            values = constructed.get(parameter)
            if values is None or not torch.isfinite(values).all():
                raise ConfigError(
                    f"{type(model).__name__} leaves '{name}' undefined: neither its constructor nor its _init_weights "
                    "sets it"
                )
            set_initializer(parameter, FixedValues(values))
        elif parameter in record.dependent:
            module, owner = last
            path = next(path for path, other in module.named_parameters() if other is parameter)
            set_initializer(parameter, WholeValues(module, owner, path))
        else:
            set_initializer(parameter, RecordedValues(tuple(writes)))


class _Record(TorchDispatchMode):
    """Records the operators that write to parameters.

    Attributes:
        module: the module that is being initialised, and its owner.
        writes: the elementwise operators that wrote to a parameter.
        last: the module whose initialisation wrote to a parameter last.
        dependent: parameters that others wrote to, so that their elements may depend on each other.
    """

    module: tuple[nn.Module, nn.Module]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._of_storage = {parameter.untyped_storage()._cdata: parameter for parameter in model.parameters()}
        self.writes: dict[nn.Parameter, list[_Write]] = {}
        self.last: dict[nn.Parameter, tuple[nn.Module, nn.Module]] = {}
        self.dependent: set[nn.Parameter] = set()

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        if operator._schema.is_mutable and arguments and isinstance(arguments[0], Tensor):
            parameter = self._of_storage.get(arguments[0].untyped_storage()._cdata)
            if parameter is not None:
                self._note(parameter, operator, arguments, keywords)
        return operator(*arguments, **keywords)

    def _note(
        self, parameter: nn.Parameter, operator: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        self.last[parameter] = self.module
        is_elementwise = operator.name() in _ELEMENTWISE and arguments[0].shape == parameter.shape
        if not is_elementwise or any(isinstance(value, Tensor) for value in (*arguments[1:], *keywords.values())):
            self.dependent.add(parameter)
        numbers = {name: value for name, value in keywords.items() if name != "generator"}
        self.writes.setdefault(parameter, []).append(_Write(operator, tuple(arguments[1:]), numbers))


def _in_order(model: nn.Module, owner: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Modules in the order in which transformers initialises them, each with the innermost `PreTrainedModel` around it.

    Args:
        model: where to begin.
        owner: the `PreTrainedModel` around it.
    """
    owner = model if hasattr(model, "_init_weights") else owner
    for child in model.children():
        yield from _in_order(child, owner)
    yield model, owner


def _forget_initialized(model: nn.Module) -> None:
    """Let `_init_weights` write to everything: it skips what is marked as initialised."""
    for item in (*model.modules(), *model.parameters(), *model.buffers()):
        setattr(item, "_is_hf_initialized", False)  # noqa: B010 (no attribute of these classes)


def _materialized_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU; its floating-point parameters are NaN, so that a value that is not set is seen."""
    result = copy.deepcopy(module)
    for part in result.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.full(parameter.shape, float("nan"), dtype=torch.float32)
                setattr(part, name, nn.Parameter(values, requires_grad=False))
    return result
