"""A float8 weight in the guise of a parameter: what FSDP gathers when it gathers float8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_KEPT_BY = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.as_strided.default,
    torch.ops.aten.view.default,
)
"""Operations that FSDP and autograd do to a parameter, with its own shape."""


class Float8Weight(Tensor):
    """`float8 * scale` for those who know it; for all others a tensor of `dtype` that is computed when it is read.

    It can be a parameter, whose gradient is a plain tensor of `dtype`.

    Attributes:
        float8: its values, divided by the scale.
        scale: fp32 scalar tensor; may be exchanged together with what is in `float8`.
    """

    float8: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, float8: Tensor, scale: Tensor, dtype: torch.dtype) -> Float8Weight:
        weight: Float8Weight = Tensor._make_wrapper_subclass(
            cls, float8.shape, strides=float8.stride(), dtype=dtype, device=float8.device
        )
        return weight

    def __init__(self, float8: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.float8, self.scale = float8, scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Float8Weight({list(self.shape)}, {self.dtype})"

    # As compilers ask for it.
    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["float8", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Float8Weight:
        return Float8Weight(inner["float8"], inner["scale"], dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args else None
        if function in _KEPT_BY and isinstance(first, Float8Weight) and _keeps_shape(first, args[1:]):
            return Float8Weight(first.float8, first.scale, first.dtype)
        args, kwargs = tree_map_only(Float8Weight, _read, (args, kwargs or {}))
        return function(*args, **kwargs)


def _keeps_shape(weight: Float8Weight, arguments: tuple[Any, ...]) -> bool:
    return not arguments or tuple(arguments[0]) == tuple(weight.shape)


def _read(weight: Float8Weight) -> Tensor:
    return (weight.float8.float() * weight.scale).to(weight.dtype)
