"""Buckets of positions against the definition, number by number."""

from __future__ import annotations

import torch

from internlm.core.position_buckets import NUM_BUCKETS, bucket_of, name_of


def test_every_position_is_in_the_bucket_whose_name_has_it() -> None:
    positions = torch.tensor([[*range(70), 2**20 - 1, 2**20, 2**31 - 1]])
    buckets = bucket_of(positions)
    assert buckets.shape == positions.shape and buckets.dtype == torch.int64
    for position, bucket in zip(positions[0].tolist(), buckets[0].tolist(), strict=True):
        assert 0 <= bucket < NUM_BUCKETS
        first, _, last = name_of(bucket).partition("-")
        assert int(first) <= position <= int(last or first)


def test_names() -> None:
    assert [name_of(bucket) for bucket in (0, 1, 2, 3, 9)] == ["0", "1", "2-3", "4-7", "256-511"]
