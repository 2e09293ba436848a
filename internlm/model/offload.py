"""Offloading of activations to host memory between forward and backward.

Saved tensors of a layer are copied to the host while the next layer computes, and prefetched during the backward pass
of the next layer, so the device holds the activations of at most two offloaded layers (vDNN, Rhu et al. 2016,
arXiv:1602.08124; two layers in flight, as in NVIDIA's Transformer Engine). Either all tensors saved by autograd are
offloaded, or those selected by a save policy. This module knows neither models nor ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from internlm.utils.copy_stream import CopyStream, QueuedCopy

SMALLEST = 64 * 1024
"""Smallest size of an offloaded tensor, in bytes: a copy has a fixed cost, and small tensors (statistics, tables) use
little memory."""


class Stored(NamedTuple):
    """Handle of a saved tensor: a view of a layer's memory."""

    memory: _Memory
    shape: torch.Size
    strides: tuple[int, ...]


class _Memory:
    """Memory of a layer on the device, on the host, or both; several saved tensors may be views of it.

    Attributes:
        tensor: the device tensor; None while it exists only on the host.
        host: the host buffer; None until a copy has started.
        num_uses: how often it was saved, which is how often a backward pass uses it.
    """

    def __init__(self, layer: _Layer, tensor: Tensor) -> None:
        self.layer = layer
        self.tensor: Tensor | None = tensor
        self.device = tensor.device
        self.host: Tensor | None = None
        self.num_uses = 0
        self._num_used = 0

    def use(self) -> Tensor:
        """The tensor for a backward pass; its last use frees the copy on the device."""
        assert self.tensor is not None
        tensor = self.tensor
        self._num_used += 1
        if self._num_used >= self.num_uses and self.host is not None:
            self._num_used, self.tensor = 0, None
        return tensor


class _Layer:
    """The saved tensors of one layer in one forward pass; alive as long as one of the tensors is.

    Attributes:
        number: of the layer.
        previous: the previous offloaded layer in the same pass.
        copying: unfinished copies to the host; the device tensors must not be freed before they complete.
        loading: unfinished copies to the device; their tensors must not be used before they complete.
        is_needed: its backward pass has begun, or is next.
    """

    def __init__(self, number: int, previous: _Layer | None) -> None:
        self.number = number
        self.previous = previous
        self.copying: QueuedCopy[None] | None = None
        self.loading: QueuedCopy[None] | None = None
        self.is_needed = False
        self._memories: list[weakref.ref[_Memory]] = []
        self.by_address: dict[tuple[object, ...], _Memory] = {}

    def add(self, tensor: Tensor) -> Stored:
        """Add a tensor; tensors at the same address share one memory."""
        shape, strides = tensor.shape, torch.empty_like(tensor, device="meta").stride()
        # With its graph, it would keep the autograd node alive that saves it.
        tensor = tensor.detach()
        if strides == tensor.stride():
            # Dense: a flat view of the same elements.
            tensor = tensor.as_strided((tensor.numel(),), (1,))
        address = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        memory = self.by_address.get(address)
        if memory is None:
            memory = self.by_address[address] = _Memory(self, tensor)
            self._memories.append(weakref.ref(memory))
        memory.num_uses += 1
        return Stored(memory, shape, strides)

    def memories(self) -> list[_Memory]:
        """The memories that are still referenced."""
        return [memory for reference in self._memories if (memory := reference()) is not None]


class Offloading:
    """Offloads saved tensors of layers in training passes; one object for all chunks of a rank.

    Args:
        stream: copies from and to the device.
        autograd_layers: numbers of the layers whose tensors saved by autograd are offloaded, except parameters, their
            views and small tensors.
        store_layers: numbers of the layers that use this object as `TensorStore` (see `recomputed`).
        smallest: size in bytes below which a tensor stays on the device.

    Attributes:
        log: None, or a list to which (event, layer number) is appended: "copy" to the host, "release" of the device
            tensors, "load" to the device.
    """

    def __init__(
        self,
        stream: CopyStream,
        *,
        autograd_layers: Collection[int] = (),
        store_layers: Collection[int] = (),
        smallest: int = SMALLEST,
    ) -> None:
        self.autograd_layers = frozenset(autograd_layers)
        self.store_layers = frozenset(store_layers)
        self.log: list[tuple[str, int]] | None = None
        self._stream = stream
        self._smallest = smallest
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._current: _Layer | None = None
        self._previous: _Layer | None = None
        # The last offloaded layer, whose tensors are still on the device; released at the end of the next layer.
        self._copied: _Layer | None = None
        # The unfinished copy to the device and its targets, kept alive even if the graph is freed before their use.
        self._prefetch: tuple[QueuedCopy[None], list[Tensor]] | None = None

    def begin_pass(self) -> None:
        """Begin a forward pass of a chunk; called before its first layer."""
        self._previous = None

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """Context around the forward pass of each layer, offloaded or not."""
        if not torch.is_grad_enabled():
            yield
            return
        if number in self.autograd_layers or number in self.store_layers:
            self._current = _Layer(number, self._previous)
        saves = torch.autograd.graph.saved_tensors_hooks(self._save, self.get)
        try:
            with saves if number in self.autograd_layers else nullcontext():
                yield
            ended, copied = self._current, self._copied
            if ended is not None:
                self._copy_to_host(ended)
                self._copied = self._previous = ended
            if copied is not None:
                self._release(copied)
                self._copied = ended
        finally:
            self._current = None

    # -- as a TensorStore -----------------------------------------------------------------------------------------

    def put(self, tensor: Tensor) -> Stored | Tensor:
        """Store a tensor of the current layer; a small one is returned unchanged."""
        if self._current is None or tensor.nbytes < self._smallest:
            return tensor
        return self._current.add(tensor)

    def get(self, stored: Stored | Tensor) -> Tensor:
        """The stored tensor, on the device; prefetches the previous layer."""
        if isinstance(stored, Tensor):
            return stored
        memory, layer = stored.memory, stored.memory.layer
        if memory.tensor is None:
            # In a second backward pass through the same graph, the first one has freed tensors one by one.
            self._load(layer, [memory] if layer.is_needed else layer.memories())
        layer.is_needed = True
        if layer.loading is not None:
            layer.loading.wait()
            layer.loading = self._prefetch = None
        # The backward pass of the last layer may free its tensors while they are still being copied to the host.
        self._finish_copying(layer)
        if layer.previous is not None and not layer.previous.is_needed:
            self._load(layer.previous, layer.previous.memories())
        tensor = memory.use()
        if tensor.shape == stored.shape:
            return tensor
        return tensor.as_strided(stored.shape, stored.strides, tensor.storage_offset())

    # -- as hooks of autograd -------------------------------------------------------------------------------------

    def _save(self, tensor: Tensor) -> Stored | Tensor:
        base = tensor._base
        if isinstance(tensor, nn.Parameter) or (base is not None and base.is_leaf and base.requires_grad):
            return tensor
        return self.put(tensor)

    # -- copies ---------------------------------------------------------------------------------------------------

    def _copy_to_host(self, layer: _Layer) -> None:
        copies = []
        for memory in layer.memories():
            assert memory.tensor is not None
            memory.host = self._host_memory(memory, memory.tensor)
            copies.append((memory.host, memory.tensor))
        # Not earlier: an address identifies a tensor only as long as the tensor is alive.
        layer.by_address.clear()
        self._note("copy", layer)
        layer.copying = self._start(copies)

    def _host_memory(self, memory: _Memory, tensor: Tensor) -> Tensor:
        """A dense host buffer of the tensor's shape."""
        key = tensor.numel(), tensor.dtype
        free = self._free.setdefault(key, [])
        buffer = free.pop() if free else self._stream.new_host_buffer(*key)
        # The stream runs copies in order: the next copy into this buffer follows the last one out of it.
        weakref.finalize(memory, free.append, buffer).atexit = False
        return buffer.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())

    def _release(self, layer: _Layer) -> None:
        """Free the layer's device tensors, unless its backward pass has begun."""
        self._note("release", layer)
        self._finish_copying(layer)
        if not layer.is_needed:
            for memory in layer.memories():
                memory.tensor = None

    def _finish_copying(self, layer: _Layer) -> None:
        if layer.copying is not None:
            layer.copying.wait()
            layer.copying = None

    def _load(self, layer: _Layer, memories: Sequence[_Memory]) -> None:
        layer.is_needed = True
        if self._prefetch is not None:
            self._prefetch[0].wait()
            self._prefetch = None
        copies = []
        for memory in memories:
            host = memory.host
            if memory.tensor is None and host is not None:
                memory.tensor = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=memory.device)
                copies.append((memory.tensor, host))
        if copies:
            self._note("load", layer)
            layer.loading = self._start(copies)
            self._prefetch = layer.loading, [target for target, _ in copies]

    def _start(self, copies: Sequence[tuple[Tensor, Tensor]]) -> QueuedCopy[None]:
        self._stream.wait_for_compute()
        return self._stream.copy(copies)

    def _note(self, event: str, layer: _Layer) -> None:
        if self.log is not None:
            self.log.append((event, layer.number))
