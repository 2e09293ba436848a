"""Turns samples into the tensors of a micro-batch, in pinned memory if a device will copy them."""

from __future__ import annotations

import numpy as np
import torch

from internlm.data.batch import IGNORE_INDEX, MicroBatch
from internlm.data.packing.sample import Sample


def to_micro_batch(sample: Sample) -> MicroBatch:
    """Convert a sample to tensors: [1, P] if it is packed, [B, S] otherwise."""
    num_valid_tokens = int(np.count_nonzero(sample.labels != IGNORE_INDEX))
    if sample.lengths is None:
        input_ids, labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.labels)
        positions = np.arange(input_ids.shape[1])
        # 0 in the padding: the largest position of a row then gives the length of its document on the device.
        position_ids = torch.from_numpy(positions * (positions < np.array(sample.row_lengths)[:, None]))
        cu_seqlens = None
    else:
        input_ids, labels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.labels)[None]
        ends = np.cumsum(sample.lengths)
        starts = ends - sample.lengths
        position_ids = torch.from_numpy(np.arange(ends[-1]) - np.repeat(starts, sample.lengths))[None]
        cu_seqlens = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32))
    return MicroBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        type_ids=torch.from_numpy(np.broadcast_to(sample.type_ids, input_ids.shape).astype(np.int64)),
        cu_seqlens=cu_seqlens,
        lengths=sample.lengths,
        num_valid_tokens=num_valid_tokens,
        num_documents=sample.num_documents,
    )


def pin(micro: MicroBatch) -> MicroBatch:
    """Copy a micro-batch to page-locked memory, from which copies to a CUDA device are asynchronous."""
    return MicroBatch(
        input_ids=micro.input_ids.pin_memory(),
        labels=micro.labels.pin_memory(),
        position_ids=micro.position_ids.pin_memory(),
        type_ids=micro.type_ids.pin_memory(),
        cu_seqlens=None if micro.cu_seqlens is None else micro.cu_seqlens.pin_memory(),
        lengths=micro.lengths,
        num_valid_tokens=micro.num_valid_tokens,
        num_documents=micro.num_documents,
    )
