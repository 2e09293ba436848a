"""Micro-batches are copied once per step, all before the first forward pass. On a GPU: tests/cuda."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.late_copies import LateCopyStream
from helpers.tiny import global_batch, micro_batch, tiny_engine

from internlm.core.context.parallel_context import ParallelContext
from internlm.data import upload
from internlm.data.batch import MicroBatch
from internlm.data.upload import Uploader


def test_all_copies_are_queued_before_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(ParallelContext.create())
    order: list[str] = []
    copy, forward = MicroBatch.to, engine._forward

    def logged_copy(self: MicroBatch, device: Any) -> MicroBatch:
        order.append("copy")
        return copy(self, device)

    def logged_forward(*args: Any) -> Any:
        order.append("pass")
        return forward(*args)

    monkeypatch.setattr(MicroBatch, "to", logged_copy)
    monkeypatch.setattr(engine, "_forward", logged_forward)
    engine.train_step(global_batch(0, size=3), 1e-3)
    assert order == ["copy"] * 3 + ["pass"] * 3


def test_nothing_is_read_before_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    late = LateCopyStream()
    # The copies read what is on the host, so they need not wait for the device.
    late.wait_for_compute()
    monkeypatch.setattr(upload, "copy_stream_of", lambda device: late)
    micros = [micro_batch(0), micro_batch(1)]
    for arriving, micro in zip(Uploader(torch.device("cpu")).start(micros), micros, strict=True):
        assert torch.equal(arriving.get().input_ids, micro.input_ids)


def test_uploads_keep_their_order_and_what_is_known_on_the_host() -> None:
    micros = [micro_batch(0), micro_batch(1, lengths=(5, 15))]
    uploads = [uploaded.get() for uploaded in Uploader(torch.device("cpu")).start(micros)]
    assert [uploaded.lengths for uploaded in uploads] == [micro.lengths for micro in micros]
    for uploaded, micro in zip(uploads, micros, strict=True):
        assert torch.equal(uploaded.input_ids, micro.input_ids) and uploaded.num_valid_tokens == micro.num_valid_tokens
