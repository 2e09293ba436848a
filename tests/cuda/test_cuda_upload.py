"""Micro batches travel while the device is at work."""

from __future__ import annotations

import time

import pytest
import torch
from helpers.tiny import micro_batch

from internlm.data.upload import Uploader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LONG = 2_000_000_000
"""Clock cycles: about a second."""


def test_copies_do_not_wait_for_the_work_queued_before_them() -> None:
    device = torch.device("cuda", 0)
    uploader = Uploader(device)
    uploader.start([micro_batch(0).pinned()])[0].get()  # the stream's memory is there
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    busy = torch.cuda.Event()
    busy.record()
    uploads = uploader.start([micro_batch(index).pinned() for index in range(4)])
    deadline = time.monotonic() + 30
    copied = [upload.copy._event for upload in uploads]  # type: ignore[attr-defined]
    while not all(event.query() for event in copied) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not busy.query()


def test_a_pass_sees_what_was_copied() -> None:
    """Memory is used again while copies and passes of other batches are under way."""
    device = torch.device("cuda", 0)
    uploader = Uploader(device)
    sums, expected = [], []
    for start in range(0, 200, 4):
        micros = [micro_batch(index).pinned() for index in range(start, start + 4)]
        for upload in uploader.start(micros):
            torch.cuda._sleep(100_000)
            sums.append(upload.get().input_ids.square().sum())
        expected += [int(micro.input_ids.square().sum()) for micro in micros]
    assert torch.stack(sums).tolist() == expected
