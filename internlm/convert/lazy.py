"""Lazy reading of tensors that are computed in groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial

from torch import Tensor


def grouped_readers(
    read_group: Callable[[int], Mapping[str, Tensor]], groups: Iterable[Iterable[str]]
) -> dict[str, Callable[[], Tensor]]:
    """Return a reader per name. Only the last group is cached, so reading in order computes each group once.

    Args:
        read_group: number of a group -> its tensors by name.
        groups: names of each group.
    """
    cache: dict[int, Mapping[str, Tensor]] = {}

    def read(number: int, name: str) -> Tensor:
        if number not in cache:
            cache.clear()
            cache[number] = read_group(number)
        return cache[number][name]

    return {name: partial(read, number, name) for number, names in enumerate(groups) for name in names}


class TensorsOnRead(Mapping[str, Tensor]):
    """Tensors by name that are read when they are looked up, and not kept.

    Args:
        names: of the tensors, in order.
        read: name -> tensor.
    """

    def __init__(self, names: Collection[str], read: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
