"""Activations in host memory between forward and backward.

What a layer saves is copied to the host while the next layer computes, and comes back while the layer behind it
computes its gradients, so that the device holds the activations of two offloaded layers at most (vDNN, Rhu et al. 2016,
arXiv:1602.08124; with two layers in flight, as in NVIDIA's Transformer Engine). What is offloaded are the tensors that
autograd saves, or those that recomputation keeps; this module knows neither models nor ranks.
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
"""Bytes below which a tensor stays: a copy has a fixed cost, and such tensors (statistics, tables) fill no memory."""


class Stored(NamedTuple):
    """A saved tensor: what of a layer's memory it is a view of."""

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
        """The tensor for a backward pass; behind its last use, only the host keeps it."""
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
        copying, loading: what to wait for before the device's tensors are freed, and before they are used again; None:
            nothing.
        is_wanted: its backward pass has begun, or is next.
    """

    def __init__(self, number: int, previous: _Layer | None) -> None:
        self.number = number
        self.previous = previous
        self.copying: QueuedCopy[None] | None = None
        self.loading: QueuedCopy[None] | None = None
        self.is_wanted = False
        self._memories: list[weakref.ref[_Memory]] = []
        self.by_place: dict[tuple[object, ...], _Memory] = {}

    def add(self, tensor: Tensor) -> Stored:
        """Take a tensor in; what lies at the same place is there once."""
        shape, strides = tensor.shape, torch.empty_like(tensor, device="meta").stride()
        # With its history it would keep the node alive that keeps it.
        tensor = tensor.detach()
        if strides == tensor.stride():
            # Without holes or overlaps, it is any view of that many elements in a row.
            tensor = tensor.as_strided((tensor.numel(),), (1,))
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        memory = self.by_place.get(place)
        if memory is None:
            memory = self.by_place[place] = _Memory(self, tensor)
            self._memories.append(weakref.ref(memory))
        memory.num_uses += 1
        return Stored(memory, shape, strides)

    def memories(self) -> list[_Memory]:
        """Those that somebody still needs."""
        return [memory for reference in self._memories if (memory := reference()) is not None]


class Offloading:
    """Moves what layers save to host memory and back; one for all chunks of a rank, in training passes alone.

    Args:
        stream: copies from and to the device.
        saved_of: numbers of the layers whose saved tensors move. Parameters, their views and small tensors stay.
        kept_of: numbers of the layers for whose kept results this is the `TensorStore` (see `recomputed`).
        smallest: bytes below which a tensor stays.

    Attributes:
        log: when it is a list, (event, layer) is appended: "copy" to the host, "release" of the device's tensors, and
            "load" back.
    """

    def __init__(
        self,
        stream: CopyStream,
        *,
        saved_of: Collection[int] = (),
        kept_of: Collection[int] = (),
        smallest: int = SMALLEST,
    ) -> None:
        self.saved_of = frozenset(saved_of)
        self.kept_of = frozenset(kept_of)
        self.log: list[tuple[str, int]] | None = None
        self._stream = stream
        self._smallest = smallest
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        self._current: _Layer | None = None
        self._previous: _Layer | None = None
        # Still on the device: the next layer that ends, of whatever pass, comes behind its copies.
        self._leaving: _Layer | None = None
        # What copies to the device write to, until something waits for them: a graph may be dropped half used.
        self._landing: tuple[QueuedCopy[None], list[Tensor]] | None = None

    def begin_pass(self) -> None:
        """Called before the first layer of each forward pass of a chunk."""
        self._previous = None

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """Around the forward pass of each layer, offloaded or not."""
        if not torch.is_grad_enabled():
            yield
            return
        if number in self.saved_of or number in self.kept_of:
            self._current = _Layer(number, self._previous)
        saves = torch.autograd.graph.saved_tensors_hooks(self._save, self.get)
        try:
            with saves if number in self.saved_of else nullcontext():
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
        """Store a tensor of the layer that is running; a small one is returned as it is."""
        if self._current is None or tensor.nbytes < self._smallest:
            return tensor
        return self._current.add(tensor)

    def get(self, stored: Stored | Tensor) -> Tensor:
        """What was put in, on the device; the layer before is fetched at the same time."""
        if isinstance(stored, Tensor):
            return stored
        memory, layer = stored.memory, stored.memory.layer
        if memory.tensor is None:
            # A second backward pass through the same graph finds its tensors gone again, one by one.
            self._load(layer, [memory] if layer.is_wanted else layer.memories())
        layer.is_wanted = True
        if layer.loading is not None:
            layer.loading.wait()
            layer.loading = self._landing = None
        # The last layer of a pass may still be on its way to the host, when its backward pass frees it.
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
        # Until here, so that no other tensor could come to lie at the same place.
        layer.by_place.clear()
        self._note("copy", layer)
        layer.copying = self._start(copies)

    def _host_memory(self, memory: _Memory, tensor: Tensor) -> Tensor:
        """Of the shape of the tensor, without holes."""
        key = tensor.numel(), tensor.dtype
        free = self._free.setdefault(key, [])
        buffer = free.pop() if free else self._stream.new_host_buffer(*key)
        # Copies are made in order: the next one into this buffer comes behind the last one out of it.
        weakref.finalize(memory, free.append, buffer).atexit = False
        return buffer.as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())

    def _release(self, layer: _Layer) -> None:
        """Free what is on the device. What a backward pass has begun to use is left to it."""
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
