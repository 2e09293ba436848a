"""Fill-in-the-middle: undoing the transform gives the document back."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from internlm.data.packing.document_slice import make_slice
from internlm.data.packing.fill_in_the_middle import FillInTheMiddle

PRE, MID, SUF, BOS, EOS = 101, 102, 103, 104, 105
FIM = FillInTheMiddle(1.0, 0.5, PRE, MID, SUF, "document", BOS, EOS, seed=7)


def undo(ids: list[int]) -> tuple[list[int], str]:
    """The document without its last three tokens before eos, and the order that was found."""
    first, last = ids[:1] * (ids[0] == BOS), ids[-1:] * (ids[-1] == EOS)
    body = ids[len(first) : len(ids) - len(last)]
    suffix_at, middle_at = body.index(SUF), body.index(MID)
    assert body[0] == PRE and suffix_at < middle_at
    before, suffix, after = body[1:suffix_at], body[suffix_at + 1 : middle_at], body[middle_at + 1 :]
    # PRE prefix SUF suffix MID middle, or PRE SUF suffix MID prefix middle.
    return first + before + after + suffix + last, "PSM" if before else "SPM or empty prefix"


@pytest.mark.parametrize("ends", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("length", [4, 5, 9, 60])
def test_the_document_comes_back(ends: tuple[int, int], length: int) -> None:
    bos, eos = ends
    orders: Counter[str] = Counter()
    for document in range(200):
        text = list(range(1, length + 1))
        ids = np.array([BOS] * bos + text + [EOS] * eos)
        changed = FIM.transform(ids, np.ones(len(ids), dtype=bool), 0, document)
        assert changed is not None and len(changed[0]) == len(changed[1]) == len(ids)
        back, order = undo(changed[0].tolist())
        assert back == [BOS] * bos + text[: length - 3] + [EOS] * eos
        orders[order] += 1
    if length == 60:
        assert len(orders) == 2 and min(orders.values()) > 40


def test_the_mask_and_the_labels_follow_the_transformed_order() -> None:
    ids = np.arange(1, 31)
    mask = ids % 3 > 0
    changed = FIM.transform(ids, mask, 1)
    assert changed is not None
    new_ids, new_mask = changed
    for token, has_loss in zip(new_ids.tolist(), new_mask.tolist(), strict=True):
        assert has_loss == (token > 100 or token % 3 > 0)
    labels = make_slice(new_ids, new_mask, 30).labels
    assert labels.tolist() == [*np.where(new_mask[1:], new_ids[1:], -100).tolist(), -100]
    without_loss = FIM.transform(ids, np.zeros(30, dtype=bool), 1)
    assert without_loss is not None and not without_loss[1].any()


def test_rates() -> None:
    ids, mask = np.arange(1, 51), np.ones(50, dtype=bool)

    def chosen(fim: FillInTheMiddle) -> list[list[int] | None]:
        results = (fim.transform(ids, mask, document) for document in range(2000))
        return [None if each is None else each[0].tolist() for each in results]

    assert chosen(replace(FIM, rate=0.0)) == [None] * 2000
    half = chosen(replace(FIM, rate=0.5))
    assert 900 < sum(each is not None for each in half) < 1100
    whole = chosen(FIM)
    assert None not in whole
    assert all(some is None or some == each for some, each in zip(half, whole, strict=True))
    assert all(each is not None and each[1] == SUF for each in chosen(replace(FIM, spm_rate=1.0)))
    starts = [each.index(SUF) - 1 for each in chosen(replace(FIM, spm_rate=0.0)) if each is not None]
    # The smaller of two uniform cuts of [0, 47].
    assert set(starts) >= set(range(40)) and np.mean(starts) == pytest.approx(47 / 3, abs=1)


def test_cuts_are_at_every_border_of_the_text_both_ends_included() -> None:
    ids, mask = np.arange(1, 7), np.ones(6, dtype=bool)
    fim, places = replace(FIM, spm_rate=0.0), set()
    for document in range(500):
        changed = fim.transform(ids, mask, document)
        assert changed is not None
        text = changed[0].tolist()
        start = text.index(SUF) - 1
        places.add((start, start + len(text) - 1 - text.index(MID)))
    # Three tokens remain.
    assert places == {(start, stop) for start in range(4) for stop in range(start, 4)}


@pytest.mark.parametrize("ids", [[], [1], [1, 2, 3], [BOS, 1, 2, 3, EOS], [BOS], [BOS, EOS], [EOS]])
def test_a_document_without_room_remains_as_it_is(ids: list[int]) -> None:
    assert FIM.transform(np.array(ids, dtype=np.int64), np.ones(len(ids), dtype=bool), 0) is None
