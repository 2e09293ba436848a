"""Reads weights from files of torch.save: pytorch_model*.bin, consolidated.*.pth. One file is open at a time."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor

from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger
from internlm.utils.storage import StoragePath

logger = get_logger(__name__)

_REOPEN_BYTES = 1 << 30
"""Bytes read from a mapped file after which it is reopened: its pages count as resident memory until it is closed."""


class TorchFile:
    """A dict of tensors on the local disk, memory-mapped while it is read."""

    def __init__(self, path: StoragePath) -> None:
        if not path.is_local:
            raise CheckpointError(f"{path}: .bin and .pth files are read from a local disk only; copy the folder first")
        self.path = path
        self._tensors: dict[str, Any] = {}
        self._bytes_read = 0

    def entries(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor.

        Raises:
            CheckpointError: the file is damaged, or contains other than tensors.
        """
        return {
            name: (tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._open().items()
            if isinstance(tensor, Tensor)
        }

    def read(self, name: str) -> Tensor:
        """Read a tensor into new memory."""
        tensor = self._open()[name].clone()
        self._bytes_read += tensor.nbytes
        if self._bytes_read > _REOPEN_BYTES:
            self.close()
        return tensor

    def close(self) -> None:
        """Release the pages of the file; the next read reopens it."""
        self._tensors = {}
        self._bytes_read = 0

    def _open(self) -> dict[str, Any]:
        if not self._tensors:
            with open(self.path.local, "rb") as file:
                # Files of torch before 1.6 are not zip archives and cannot be mapped.
                mapped = file.read(2) == b"PK"
            try:
                loaded = torch.load(self.path.local, map_location="cpu", mmap=mapped, weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error}") from error
            if not isinstance(loaded, dict):
                raise CheckpointError(f"{self.path}: must contain a dict of tensors, but is {type(loaded).__name__}")
            nested = [name for name, value in loaded.items() if not isinstance(name, str) or isinstance(value, dict)]
            if nested:
                raise CheckpointError(
                    f"{self.path}: must contain tensors by name, but '{nested[0]}' is "
                    f"{type(loaded[nested[0]]).__name__}: save the state dict alone"
                )
            others = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
            if others:
                logger.info("%s: not read, as they are not tensors: %s", self.path, ", ".join(others))
            self._tensors = loaded
        return self._tensors
