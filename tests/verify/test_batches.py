"""Global batches are the same for every number of data ranks, and hold what `BatchChoices` says."""

from __future__ import annotations

import pytest
import torch

from internlm.data.batch import IGNORE_INDEX, MicroBatch
from internlm.verify.batches import local_batch
from internlm.verify.case import Combination


def micro_batches(text: str, steps: int = 1, data_size: int = 1) -> list[MicroBatch]:
    """All micro batches of some steps, as they are dealt to data ranks."""
    case = Combination.parse(text).case()
    batches = [local_batch(case, step, rank, data_size) for step in range(steps) for rank in range(data_size)]
    return [micro for batch in batches for micro in batch.micro_batches]


@pytest.mark.parametrize("packed", ["true", "false"])
def test_the_global_batch_does_not_depend_on_the_number_of_data_ranks(packed: str) -> None:
    text = f"ranks=1 documents:packed={packed} stepping:micro_batches=8"
    whole = micro_batches(text, steps=2)
    for data_size in (2, 4, 8):
        for one, other in zip(whole, micro_batches(text, 2, data_size), strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
            assert one.lengths == other.lengths
    assert not torch.equal(whole[0].input_ids, whole[8].input_ids)


@pytest.mark.parametrize("masked", ["none", "uneven", "micro_batches", "ends", "all"])
@pytest.mark.parametrize("ragged", ["true", "false"])
@pytest.mark.parametrize("packed", ["true", "false"])
def test_micro_batches_are_as_the_loader_makes_them(packed: str, ragged: str, masked: str) -> None:
    text = f"ranks=1 documents:packed={packed},ragged={ragged},masked={masked} stepping:micro_batches=6"
    for micro in micro_batches(text):
        assert micro.input_ids.shape == micro.labels.shape == micro.position_ids.shape == micro.type_ids.shape
        assert micro.num_valid_tokens == int((micro.labels != IGNORE_INDEX).sum())
        if packed == "true":
            assert micro.input_ids.shape == (1, 32)
            assert micro.lengths is not None and micro.cu_seqlens is not None
            assert sum(micro.lengths) == 32 and min(micro.lengths) >= 1 and max(micro.lengths) <= 16
            assert micro.cu_seqlens.tolist() == [0, *torch.tensor(micro.lengths).cumsum(0).tolist()]
            starts = micro.cu_seqlens[:-1].tolist()
        else:
            assert micro.input_ids.shape == (2, 16)
            assert micro.lengths is None and micro.cu_seqlens is None
            starts = [0, 16]
        assert micro.position_ids.flatten()[starts].eq(0).all()
        # A label is the next token of the same document, or there is none.
        ids, labels, positions = (t.flatten() for t in (micro.input_ids, micro.labels, micro.position_ids))
        valid = (labels != IGNORE_INDEX).nonzero().flatten()
        assert torch.equal(labels[valid], ids[valid + 1])
        assert torch.equal(positions[valid] + 1, positions[valid + 1])


def test_masks_are_as_uneven_as_they_promise() -> None:
    counts = {
        masked: [
            m.num_valid_tokens for m in micro_batches(f"ranks=1 documents:masked={masked} stepping:micro_batches=6")
        ]
        for masked in ("none", "uneven", "micro_batches", "ends", "all")
    }
    assert counts["all"] == [0] * 6
    assert [count == 0 for count in counts["micro_batches"]] == [False, True, False, False, True, False]
    assert all(0 < ends < none for ends, none in zip(counts["ends"], counts["none"], strict=True))
    assert counts["uneven"][1] < counts["uneven"][0] / 2
    for micro in micro_batches("ranks=1 documents:masked=ends"):
        assert micro.labels[:, 8:].eq(IGNORE_INDEX).all()
