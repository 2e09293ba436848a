"""Weights under the names of this package, from any format: a checkpoint, a Hugging Face folder, InternEvo's files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from internlm.utils.errors import CheckpointError

_BLOCK = 1 << 22
"""Number of values that are checked at a time."""


class WeightSource(Protocol):
    """Full tensors by global name, read one at a time."""

    def names(self) -> Collection[str]:
        """Names of all tensors, such as `layers.0.attention.wqkv.weight`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def read(self, name: str) -> Tensor:
        """A full tensor, on the CPU."""


@runtime_checkable
class FileNames(Protocol):
    """A `WeightSource` whose files have other names than the model.

    Attributes:
        lacking: name of a weight of the model that `names()` excludes -> names that the files lack of it.
    """

    lacking: Mapping[str, Sequence[str]]


def finite(tensor: Tensor, name: str, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """Cast a tensor and check that all its values are finite before and after.

    Args:
        tensor: the values to check.
        name: name of the tensor, for messages.
        what: origin of the tensor, for messages.
        dtype: dtype of the result; None: that of the tensor.

    Raises:
        CheckpointError: a value is not finite, or too large for the dtype.
    """
    if not _is_finite(tensor):
        number = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{what}: '{name}' has {number:,} of {tensor.numel():,} values that are not finite (NaN or inf): the file "
            "is damaged, or the model had diverged"
        )
    if dtype is None or dtype == tensor.dtype:
        return tensor
    cast = tensor.to(dtype)
    if not _is_finite(cast):
        largest, limit = float(tensor.abs().max()), torch.finfo(dtype).max
        fits = "bf16 or fp32" if largest <= torch.finfo(torch.bfloat16).max else "fp32"
        raise CheckpointError(
            f"{what}: '{name}' has values up to {largest:.4g}, above the largest {str(dtype).removeprefix('torch.')}, "
            f"{limit:.4g}: they would become inf; use {fits}"
        )
    return cast


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; block by block, as `isfinite` takes several times the memory of its argument."""
    return all(bool(torch.isfinite(block).all()) for block in tensor.flatten().split(_BLOCK))


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed on demand.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        read: computes the tensor.
        read_slice: computes slice i of dim 0; None if only the whole tensor can be computed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    read_slice: Callable[[int], Tensor] | None = None

    @classmethod
    def stacked(cls, shape: tuple[int, ...], dtype: torch.dtype, read_slice: Callable[[int], Tensor]) -> LazyTensor:
        """A tensor that is computed slice by slice of dim 0, such as expert by expert."""
        return cls(shape, dtype, lambda: torch.stack([read_slice(index) for index in range(shape[0])]), read_slice)
