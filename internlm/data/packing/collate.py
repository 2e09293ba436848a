"""Turns samples into the tensors of a micro-batch."""

from __future__ import annotations

import numpy as np
import torch

from internlm.data.batch import IGNORE_INDEX, MicroBatch
from internlm.data.packing.image_placeholders import IMAGE_FEATURES
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
    is_padding = None
    if sample.is_padding is not None:
        is_padding = torch.from_numpy(sample.is_padding).view(input_ids.shape)
    extra = {}
    if sample.image_features is not None:
        extra[IMAGE_FEATURES] = torch.from_numpy(sample.image_features).view(input_ids.shape)
    return MicroBatch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        type_ids=torch.from_numpy(np.broadcast_to(sample.type_ids, input_ids.shape).astype(np.int64)),
        cu_seqlens=cu_seqlens,
        lengths=sample.lengths,
        num_valid_tokens=num_valid_tokens,
        num_documents=sample.num_documents,
        is_padding=is_padding,
        num_padding_tokens=0 if sample.is_padding is None else int(np.count_nonzero(sample.is_padding)),
        extra=extra,
        images=None if sample.images is None else torch.from_numpy(sample.images),
    )
