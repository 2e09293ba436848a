"""Loaders whose workers are forked after CUDA has been initialized deliver the batches of one without a device."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.sources.open_source import open_source
from internlm.data.sources.sample_stream import ShuffledSource

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pinned_batches_are_those_of_the_host(num_workers: int) -> None:
    torch.zeros(1, device="cuda")
    source = open_source(
        None, seq_len=64, micro_bsz=2, packing="cut", vocab_size=500, fixed_random_dataset_seqlen=False
    )
    plain = build_train_loader(ShuffledSource(source, 1), micro_num=2)
    pinned = build_train_loader(ShuffledSource(source, 1), micro_num=2, num_workers=num_workers, pin_memory=True)
    try:
        for _ in range(20):
            for expected, found in zip(next(plain).micro_batches, next(pinned).micro_batches, strict=True):
                assert found.input_ids.is_pinned()
                on_device = found.to("cuda")
                for field in fields(expected):
                    value = getattr(expected, field.name)
                    if isinstance(value, Tensor):
                        assert torch.equal(getattr(on_device, field.name).cpu(), value)
                    else:
                        assert getattr(on_device, field.name) == value
    finally:
        plain.close()
        pinned.close()
