"""Boxes of global tensors, as torch.distributed.checkpoint saves and loads them.

The library's planners get write items and chunks from an object by method name; the two planners below add the lookup
of a chunk by its offset. Sharded, fused and replicated tensors need no special case.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from internlm.core.parallel.shard_spec import Box, ShardSpec


@dataclass
class BoxedTensor:
    """The boxes of a global tensor that a rank holds.

    Attributes:
        global_shape: shape of the global tensor.
        dtype: dtype of all pieces.
        pieces: (box, tensor of its size, usually a view); loading writes into the tensors.
    """

    global_shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[tuple[Box, Tensor]]

    @classmethod
    def of_parameter(cls, tensor: Tensor, spec: ShardSpec) -> BoxedTensor:
        """The boxes of a local tensor laid out by `spec`."""
        pieces = [(box, tensor.detach()[box.local_slices()]) for box in spec.boxes]
        return cls(spec.global_shape, tensor.dtype, pieces)

    def size(self) -> torch.Size:
        """Shape of the global tensor; the library compares it with the saved shape."""
        return torch.Size(self.global_shape)

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.global_offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(piece),
                    size=self.size(),
                ),
            )
            for (box, piece), chunk in zip(self.pieces, self.__create_chunk_list__(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(box.global_offset), sizes=torch.Size(box.size))
            for box, _ in self.pieces
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        wanted = tuple(index.offset)
        return next(piece for box, piece in self.pieces if box.global_offset == wanted)


def merge_by_key(tensors: Iterable[tuple[str, BoxedTensor]]) -> dict[str, BoxedTensor]:
    """Join the boxes of equal keys: several local tensors may hold parts of one global tensor."""
    merged: dict[str, BoxedTensor] = {}
    for key, tensor in tensors:
        if key in merged:
            assert (tensor.global_shape, tensor.dtype) == (merged[key].global_shape, merged[key].dtype), key
            merged[key].pieces.extend(tensor.pieces)
        else:
            merged[key] = tensor
    return merged


class BoxSavePlanner(DefaultSavePlanner):
    """Saves a flat dict of `BoxedTensor`s, tensors and picklable values."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        # The reader expects the elements in row-major order.
        if isinstance(value, BoxedTensor):
            return value.__get_tensor_shard__(index).contiguous()
        return super().lookup_object(index)


class BoxLoadPlanner(DefaultLoadPlanner):
    """Loads into a flat dict of `BoxedTensor`s, tensors and picklable values, from any boxes."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The library's method materializes meta tensors, and drops values of unknown classes.
        self.original_state_dict = self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        value = self.state_dict[index.fqn]
        return value.__get_tensor_shard__(index) if isinstance(value, BoxedTensor) else super().lookup_tensor(index)
