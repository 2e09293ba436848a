"""Batches, as loaders deliver them to the engine: tensors, and the lengths that the host needs.

Legend of shapes: M micro-batches, B sequences, S tokens of a sequence, P packed length, n attention segments, N
pictures of H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position without loss."""


class LaterTokens(NamedTuple):
    """What a layer that predicts later tokens reads and predicts, int64 `[B, S]` each.

    Attributes:
        input_ids: the tokens m positions later; 0 where the document ends before.
        labels: the labels of these tokens; `IGNORE_INDEX` where the document ends before.
    """

    input_ids: Tensor
    labels: Tensor


@dataclass
class MicroBatch:
    """The tokens of one forward pass on one data rank.

    Packed: tensors are `[1, P]`, and `cu_seqlens` / `lengths` give the attention segments. Unpacked: tensors are
    `[B, S]`, `cu_seqlens` and `lengths` are None, rows are padded on the right with label `IGNORE_INDEX`, and attention
    is causal within a row.

    Attributes:
        input_ids: int64 token ids, never negative.
        labels: int64, the next token of the same document, or `IGNORE_INDEX`.
        position_ids: int64, restarting at 0 in each attention segment; 0 in the padding of an unpacked row.
        type_ids: int64, indices into the `type_names` of the loader.
        cu_seqlens: int32 `[n + 1]`, cumulative segment lengths from 0 to P; None when unpacked.
        lengths: the segment lengths as host integers, so that nothing waits for the device to read them.
        num_valid_tokens: number of labels other than `IGNORE_INDEX`, counted on the host.
        num_documents: number of documents, or parts of documents; None: as many as attention segments.
        is_padding: bool, the tokens that belong to no document, which routers of experts do not count; None if there
            are none. Tokens of a document whose label is `IGNORE_INDEX` are not padding.
        num_padding_tokens: number of these tokens, counted on the host.
        token_indices: int64 `[1, S]`, where the tokens of a sample are dealt to several ranks: their indices in the
            sample, whose documents `cu_seqlens` and `lengths` describe. None: all tokens of the sample, in order.
        later: tokens 1, 2 ... positions later, for layers that predict later tokens; the engine fills it.
        extra: further values per token, by name, each `[B, S, ...]`; passed as `extra` to the forward method of the
            model, on each rank for the tokens of its part of the residual stream.
        images: float `[N, 3, H, W]`, the pictures of all rows in the order of their placeholders; the engine passes
            them as `images` to the forward method of the model. None: no picture. `extra["image_features"]` then says
            which token stands for which part of them; see `internlm.data.packing.image_placeholders`.

    Raises:
        ValueError: the first two dimensions of a tensor of `extra` differ from those of `input_ids`, or `images` has
            another shape.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    type_ids: Tensor
    cu_seqlens: Tensor | None
    lengths: tuple[int, ...] | None
    num_valid_tokens: int
    num_documents: int | None = None
    is_padding: Tensor | None = None
    num_padding_tokens: int = 0
    token_indices: Tensor | None = None
    later: list[LaterTokens] = field(default_factory=list)
    extra: dict[str, Tensor] = field(default_factory=dict)
    images: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in self.extra.items():
            if tensor.shape[:2] != self.input_ids.shape:
                shapes = f"{list(tensor.shape)}, and input_ids are {list(self.input_ids.shape)}"
                raise ValueError(f"extra['{name}'] is {shapes}: it must begin with the same two dimensions")
        if self.images is not None and (self.images.ndim != 4 or self.images.shape[1] != 3):
            raise ValueError(f"images is {list(self.images.shape)}: it must be [pictures, 3, height, width]")

    @property
    def num_sample_tokens(self) -> int:
        """Number of tokens of the whole sample, with padding."""
        return self.input_ids.numel() if self.lengths is None else sum(self.lengths)

    def to(self, device: torch.device | str) -> MicroBatch:
        """Copy to `device`, asynchronously from pinned memory."""
        return self.copied(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """Copy to page-locked memory, from which copies to a CUDA device are asynchronous."""
        return self.copied(Tensor.pin_memory)

    def copied(self, copy: Callable[[Tensor], Tensor]) -> MicroBatch:
        """Copy every tensor with `copy`."""
        return replace(
            self,
            input_ids=copy(self.input_ids),
            labels=copy(self.labels),
            position_ids=copy(self.position_ids),
            type_ids=copy(self.type_ids),
            cu_seqlens=None if self.cu_seqlens is None else copy(self.cu_seqlens),
            is_padding=None if self.is_padding is None else copy(self.is_padding),
            token_indices=None if self.token_indices is None else copy(self.token_indices),
            later=[LaterTokens(copy(ids), copy(labels)) for ids, labels in self.later],
            extra={name: copy(tensor) for name, tensor in self.extra.items()},
            images=None if self.images is None else copy(self.images),
        )


@dataclass
class Batch:
    """One data rank's share of a global batch: what one optimizer step consumes on this rank.

    Attributes:
        micro_batches: M micro-batches, M the same on every data rank.
        num_samples: samples of the *global* batch, of all data ranks; the cursor advances by this number.
        sample_indices: global sample indices of this rank's micro-batches, in order, to trace a loss spike back to its
            documents.
        unreadable: one message for each document of this rank that could not be read and was replaced by padding.
        num_truncated_answers: number of documents of this rank that lost every label by truncation at seq_len.
        cursors: for the loader: `Sample.cursor` of each micro-batch.
    """

    micro_batches: list[MicroBatch]
    num_samples: int
    sample_indices: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    num_truncated_answers: int = 0
    cursors: list[Any] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Number of tokens on this rank, with padding."""
        return sum(micro.input_ids.numel() for micro in self.micro_batches)

    @property
    def num_pictures(self) -> int:
        """Number of pictures on this rank."""
        return sum(len(micro.images) for micro in self.micro_batches if micro.images is not None)

    @property
    def segment_lengths(self) -> list[tuple[int, ...]]:
        """Lengths of the attention segments of each micro-batch; an unpacked row is one segment."""
        return [
            micro.lengths if micro.lengths is not None else (micro.input_ids.shape[1],) * micro.input_ids.shape[0]
            for micro in self.micro_batches
        ]

    @property
    def num_documents(self) -> list[int]:
        """Number of documents of each micro-batch."""
        return [
            len(lengths) if micro.num_documents is None else micro.num_documents
            for micro, lengths in zip(self.micro_batches, self.segment_lengths, strict=True)
        ]

    @property
    def num_valid_tokens(self) -> int:
        """Number of tokens on this rank that contribute loss."""
        return sum(micro.num_valid_tokens for micro in self.micro_batches)
