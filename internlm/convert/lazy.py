"""Tensors that are computed in groups and read one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor


def grouped_readers(
    read_group: Callable[[int], Mapping[str, Tensor]], groups: Iterable[Iterable[str]]
) -> dict[str, Callable[[], Tensor]]:
    """A reader a name. The last group is kept until another one is wanted, so that each is made once.

    Args:
        read_group: number of a group -> its tensors by name.
        groups: names of each group.
    """
    kept: dict[int, Mapping[str, Tensor]] = {}

    def read(number: int, name: str) -> Tensor:
        if number not in kept:
            kept.clear()
            kept[number] = read_group(number)
        return kept[number][name]

    return {name: partial(read, number, name) for number, names in enumerate(groups) for name in names}
