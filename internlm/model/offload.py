"""Activations in host memory between forward and backward.

What a layer saves is copied to the host while the next layer computes, and prefetched while the layer after it runs
its backward pass, so that the device holds the activations of two offloaded layers at most (vDNN, Rhu et al. 2016,
arXiv:1602.08124; with two layers in flight, as in NVIDIA's Transformer Engine). Offloaded are the tensors that autograd
saves, or those that a save policy saves; this module knows neither models nor ranks.
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
"""Bytes below which a tensor stays on the device: a copy has a fixed cost, and small tensors (statistics, tables) take
little memory."""


class Stored(NamedTuple):
    """The handle of a saved tensor: a view of a layer's memory."""

    memory: _Memory
    shape: torch.Size
    strides: tuple[int, ...]


class _Memory:
    """Memory of a layer, on the device, in host memory, or both; several saved tensors may be views of it.

    Attributes:
        tensor: on the device; None when it is only in host memory.
        host: in host memory, once a copy has started.
        num_uses: how often it was saved, which is how often a backward pass asks for it.
    """

    def __init__(self, layer: _Layer, tensor: Tensor) -> None:
        self.layer = layer
        self.tensor: Tensor | None = tensor
        self.device = tensor.device
        self.host: Tensor | None = None
        self.num_uses = 0
        self._num_asked = 0

    def use(self) -> Tensor:
        """The tensor for a backward pass; its last use frees the copy on the device."""
        assert self.tensor is not None
        tensor = self.tensor
        self._num_asked += 1
        if self._num_asked >= self.num_uses and self.host is not None:
            self._num_asked, self.tensor = 0, None
        return tensor


class _Layer:
    """What one layer saved in one forward pass; it lives as long as one of its tensors.

    Attributes:
        number: of the layer.
        previous: the offloaded layer before it in the same pass.
        copying: copies to the host, to wait for before the device's tensors are freed; None: done.
        loading: copies to the device, to wait for before their tensors are used; None: done.
        is_wanted: its backward pass has begun, or is next.
    """

    def __init__(self, number: int, previous: _Layer | None) -> None:
        self.number = number
        self.previous = previous
        self.copying: QueuedCopy[None] | None = None
        self.loading: QueuedCopy[None] | None = None
        self.is_wanted = False
        self._memories: list[weakref.ref[_Memory]] = []
        self.by_address: dict[tuple[object, ...], _Memory] = {}

    def add(self, tensor: Tensor) -> Stored:
        """Add a tensor; tensors at the same address share one memory."""
        shape, strides = tensor.shape, torch.empty_like(tensor, device="meta").stride()
        # Attached to its graph, it would keep the autograd node alive that saves it.
        tensor = tensor.detach()
        if strides == tensor.stride():
            # Dense: a flat view of that many elements.
            tensor = tensor.as_strided((tensor.numel(),), (1,))
        address = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        memory = self.by_address.get(address)
        if memory is None:
            memory = self.by_address[address] = _Memory(self, tensor)
            self._memories.append(weakref.ref(memory))
        memory.num_uses += 1
        return Stored(memory, shape, strides)

    def memories(self) -> list[_Memory]:
        """Those that are still referenced."""
        return [memory for reference in self._memories if (memory := reference()) is not None]


class Offloading:
    """Moves what layers save to host memory and back, in training passes alone; one object for all chunks of a rank.

    Args:
        stream: copies from and to the device.
        autograd_layers: numbers of the layers whose tensors saved by autograd move. Parameters, their views and small
            tensors stay.
        store_layers: numbers of the layers for whose saved results this is the `TensorStore` (see `recomputed`).
        smallest: bytes below which a tensor stays.

    Attributes:
        log: None, or a list to which (event, layer) is appended: "copy" to the host, "release" of the device's tensors,
            and "load" back.
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
        # The last offloaded layer, whose tensors are still on the device: freed when the next layer ends, of any pass.
        self._leaving: _Layer | None = None
        # What copies to the device write to, until something waits for them: a graph may be dropped half used.
        self._landing: tuple[QueuedCopy[None], list[Tensor]] | None = None

    def begin_pass(self) -> None:
        """Start a forward pass of a chunk; called before its first layer."""
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
            ended, leaving = self._current, self._leaving
            if ended is not None:
                self._copy_to_host(ended)
                self._leaving = self._previous = ended
            if leaving is not None:
                self._release(leaving)
                self._leaving = ended
        finally:
            self._current = None

    # -- as a TensorStore -----------------------------------------------------------------------------------------

    def put(self, tensor: Tensor) -> Stored | Tensor:
        """Store a tensor of the running layer; a small one is returned as it is."""
        if self._current is None or tensor.nbytes < self._smallest:
            return tensor
        return self._current.add(tensor)

    def get(self, stored: Stored | Tensor) -> Tensor:
        """The stored tensor, on the device; prefetches the layer before."""
        if isinstance(stored, Tensor):
            return stored
        memory, layer = stored.memory, stored.memory.layer
        if memory.tensor is None:
            # In a second backward pass through the same graph, tensors were freed again one by one.
            self._load(layer, [memory] if layer.is_wanted else layer.memories())
        layer.is_wanted = True
        if layer.loading is not None:
            layer.loading.wait()
            layer.loading = self._landing = None
        # The backward pass of the last layer may free its tensors while they are still being copied to the host.
        self._finish_copying(layer)
        if layer.previous is not None and not layer.previous.is_wanted:
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
        # Not earlier: while the tensors are alive, no other tensor can get their address.
        layer.by_address.clear()
        self._note("copy", layer)
        layer.copying = self._start(copies)

    def _host_memory(self, memory: _Memory, tensor: Tensor) -> Tensor:
        """A dense host buffer of the tensor's shape."""
        key = tensor.numel(), tensor.dtype
        free = self._free.setdefault(key, [])
        buffer = free.pop() if free else self._stream.new_host_buffer(*key)
        # Copies are made in order: the next one into this buffer comes behind the last one out of it.
        weakref.finalize(memory, free.append, buffer).atexit = False
        return buffer.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())

    def _release(self, layer: _Layer) -> None:
        """Free the layer's tensors on the device, unless its backward pass has begun."""
        self._note("release", layer)
        self._finish_copying(layer)
        if not layer.is_wanted:
            for memory in layer.memories():
                memory.tensor = None

    def _finish_copying(self, layer: _Layer) -> None:
        if layer.copying is not None:
            layer.copying.wait()
            layer.copying = None

    def _load(self, layer: _Layer, memories: Sequence[_Memory]) -> None:
        layer.is_wanted = True
        if self._landing is not None:
            self._landing[0].wait()
            self._landing = None
        copies = []
        for memory in memories:
            host = memory.host
            if memory.tensor is None and host is not None:
                memory.tensor = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=memory.device)
                copies.append((memory.tensor, host))
        if copies:
            self._note("load", layer)
            layer.loading = self._start(copies)
            self._landing = layer.loading, [target for target, _ in copies]

    def _start(self, copies: Sequence[tuple[Tensor, Tensor]]) -> QueuedCopy[None]:
        self._stream.wait_for_compute()
        return self._stream.copy(copies)

    def _note(self, event: str, layer: _Layer) -> None:
        if self.log is not None:
            self.log.append((event, layer.number))
