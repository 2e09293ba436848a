"""Weights by our names, wherever they come from: a checkpoint of ours, a Hugging Face folder, InternEvo's files."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class WeightSource(Protocol):
    """Whole tensors by global name, read one at a time."""

    def names(self) -> Collection[str]:
        """All tensors, such as `layers.0.attention.wqkv.weight`."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of them."""

    def read(self, name: str) -> Tensor:
        """One of them, whole, on the CPU."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is wanted."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
