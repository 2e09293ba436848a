"""Linear layers: plain, grouped by the input that they share, packed into one, and with float8 GEMMs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from internlm.model.initialization import Zeros, set_initializer
from internlm.model.ops.float8.linear import float8_linear
from internlm.model.ops.linear import linear
from internlm.utils.former_names import explain_former_names

explain_former_names(__name__)

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture


class Linear(nn.Linear):
    """nn.Linear whose GEMMs are those of `internlm.model.ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return linear(x, self.weight, self.bias)


def make_linear(
    architecture: Architecture,
    in_features: int,
    out_features: int,
    bias: bool,
    std: float,
    *,
    into_residual: bool = False,
) -> nn.Linear:
    """A linear layer whose weight starts with standard deviation `std`.

    `into_residual`: its output is added to the residual stream. With scaled initialisation its std is divided by
    sqrt(2 L), so that the sum over the 2 L blocks of an L-layer model has the variance of one (GPT-2, section 2.3).
    """
    layer = Linear(in_features, out_features, bias=bias, dtype=architecture.dtype)
    if into_residual and architecture.init.scaled:
        std = std / math.sqrt(2 * architecture.num_layers)
    set_initializer(layer.weight, architecture.init.initializer(std))
    if bias:
        set_initializer(layer.bias, Zeros())
    return layer


class GroupedLinear(nn.Module):
    """Linear layers of one module that share an input: called once for all their outputs.

    Holds no parameter: the layers stay children of the module that owns them, so names of weights do not depend on the
    grouping. A parallel mode puts a module in its place that exchanges the input once for the group.

    Args:
        owner: module whose children the layers are.
        names: attributes of the layers in `owner`, in the order of the outputs.
    """

    def __init__(self, owner: nn.Module, *names: str) -> None:
        super().__init__()
        self.names = names
        # In a tuple, as a module that is assigned would become a child.
        self._owner = (owner,)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[..., in]` -> `[..., out]` of each layer."""
        return tuple(layer(x) for layer in self.layers())

    def layers(self) -> list[nn.Module]:
        """The layers, in the order of the outputs."""
        (owner,) = self._owner
        return [getattr(owner, name) for name in self.names]


class UnpackedLinear(nn.Module):
    """One linear layer whose weight packs the rows of several: called for their separate outputs.

    Holds no parameter: the layer stays a child of the module that owns it, as with `GroupedLinear`.

    Args:
        owner: module whose child the layer is.
        name: attribute of the layer in `owner`.
        unpack: `[..., packed]` -> the separate outputs.
    """

    def __init__(self, owner: nn.Module, name: str, unpack: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.name = name
        self.unpack = unpack
        # In a tuple, as a module that is assigned would become a child.
        self._owner = (owner,)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[..., in]` -> `[..., out]` of each packed projection."""
        (owner,) = self._owner
        return self.unpack(getattr(owner, self.name)(x))


class Float8Linear(nn.Module):
    """A linear layer that runs its GEMMs in float8; its parameters are those of nn.Linear.

    Args:
        weight: `[out, in]`.
        bias: `[out]` or None.
        on_hardware: see `internlm.model.ops.float8.scaled_gemm.runs_on_hardware`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, on_hardware: bool) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.on_hardware = on_hardware

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return float8_linear(x, self.weight, self.bias, on_hardware=self.on_hardware)
