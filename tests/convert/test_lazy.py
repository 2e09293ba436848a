"""Groups of tensors are made once, when wanted, and only one is kept."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from internlm.convert.lazy import grouped_readers


def test_one_group_at_a_time_is_kept() -> None:
    made: list[int] = []
    alive: list[weakref.ref[Tensor]] = []

    def make(number: int) -> dict[str, Tensor]:
        # The group before is gone before this one takes memory.
        assert all(reference() is None for reference in alive)
        made.append(number)
        group = {name: torch.full((3,), float(number)) for name in groups[number]}
        alive.extend(weakref.ref(tensor) for tensor in group.values())
        return group

    groups = [["a", "b"], ["c"], ["d"]]
    readers = grouped_readers(make, groups)
    assert made == []
    assert [float(readers[name]()[0]) for name in "abcd"] == [0, 0, 1, 2]
    assert made == [0, 1, 2]
    assert float(readers["b"]()[0]) == 0 and made == [0, 1, 2, 0]
