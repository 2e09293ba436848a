"""A global tensor of which this rank holds some boxes, in the form that torch.distributed.checkpoint saves and loads.

The library's planners ask an object for its write items and chunks by method name; the two planners below add the
lookup of a chunk by its offset. With these, sharded, fused and replicated tensors need no special case.
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
    """Some boxes of a global tensor.

    Attributes:
        global_shape: shape of the whole tensor.
        dtype: of every piece.
        pieces: (box, tensor of the box's size, usually a view); loading writes into the tensors.
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
        """Shape of the global tensor; the library compares it with what was saved."""
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
    """One `BoxedTensor` a key, with the boxes of all that have it: several local tensors may be parts of one."""
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
        # The reader takes a tensor's bytes for its elements in order.
        if isinstance(value, BoxedTensor):
            return value.__get_tensor_shard__(index).contiguous()
        return super().lookup_object(index)


class BoxLoadPlanner(DefaultLoadPlanner):
    """Loads into a flat dict of `BoxedTensor`s, tensors and picklable values, whatever boxes they were saved in."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The library's method walks the values to give meta tensors storage, and drops values of unknown classes.
        self.original_state_dict = self.state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        value = self.state_dict[index.fqn]
        return value.__get_tensor_shard__(index) if isinstance(value, BoxedTensor) else super().lookup_tensor(index)
