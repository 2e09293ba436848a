"""Exact memory of tensors on any device: bytes of the storages that are alive, counted where they are made."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """While open, counts storages made by operations; those made before do not count.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Storages that come in were made before, or are known.
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage(), counts=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage, *, counts: bool = True) -> None:
        if storage._cdata in self._known:
            return
        key, size = storage._cdata, storage.nbytes() if counts else 0
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        # Also of those that do not count: another storage may come to lie at the same address.
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
