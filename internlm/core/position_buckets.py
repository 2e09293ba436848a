"""Buckets of positions, whose bounds are powers of two, to see the loss by the length of the context.

Bucket 0 is position 0, bucket b > 0 has the positions from 2^(b - 1) to 2^b - 1. A token at position p of its document
sees p + 1 tokens, itself included, when it predicts the next one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from internlm.data.batch import MicroBatch

NUM_BUCKETS = 32
"""Enough for positions below 2^31."""


def bucket_of(position_ids: Tensor) -> Tensor:
    """The bucket of each position: int64, of the same shape and device."""
    bounds = 2 ** torch.arange(NUM_BUCKETS - 1, device=position_ids.device)
    return torch.bucketize(position_ids, bounds, right=True)


def name_of(bucket: int) -> str:
    """The positions of a bucket, both ends included, such as "256-511"."""
    first, last = 2**bucket // 2, 2**bucket - 1
    return str(last) if first == last else f"{first}-{last}"


def typed_by_position(micro_batch: MicroBatch) -> MicroBatch:
    """The micro-batch with the bucket of each position as `type_ids`.

    So buckets reach the losses in the way of labels, whatever part of a sample a rank computes.
    """
    return replace(micro_batch, type_ids=bucket_of(micro_batch.position_ids))
