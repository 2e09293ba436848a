"""Groups of tensors are made once, when wanted, and only one is kept."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from internlm.convert.lazy import TensorsOnRead, grouped_readers


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


def test_tensors_on_read_are_not_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        tensor = torch.full((3,), float(len(name)))
        alive.append(weakref.ref(tensor))
        return tensor

    tensors = TensorsOnRead(["a", "bb"], read)
    assert list(tensors) == ["a", "bb"] and len(tensors) == 2 and not alive
    assert [float(tensor[0]) for tensor in map(tensors.__getitem__, tensors)] == [1, 2]
    assert all(reference() is None for reference in alive)
    assert tensors.get("c") is None
    with pytest.raises(KeyError):
        tensors["c"]
