"""Rectangles of an attention matrix: which queries see which keys, and how a rectangle is split for a kernel.

A kernel computes rectangles without a mask and causal squares; sliding windows and shifted diagonals are split into
these. What remains is split into pieces of bounded size with a mask. Every piece has two properties that kernels need:
each of its queries sees at least one key, and none of its sides is empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_BAND = 64
"""Minimum number of queries per piece with a window: shorter pieces cost more in calls than they save in scores."""

_EDGE = 512
"""Maximum number of queries per piece with a window, whose far edge needs a mask of that size squared."""


class Tile(NamedTuple):
    """A range of queries and a range of keys, as row numbers of two tensors, and which of these keys the queries see.

    Attributes:
        q_start, q_stop: the range of queries.
        k_start, k_stop: the range of keys.
        distance: position of the first query minus position of the first key, in the sequence that both belong to.
            Query i sees key j if 0 <= distance + i - j, and distance + i - j < window with a window. None: every query
            sees every key.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    distance: int | None

    @property
    def num_queries(self) -> int:
        return self.q_stop - self.q_start

    @property
    def num_keys(self) -> int:
        return self.k_stop - self.k_start

    @property
    def is_causal_square(self) -> bool:
        """Whether the tile is computed by a causal kernel without a mask, if no window ends in it."""
        return self.distance == 0 and self.num_queries == self.num_keys

    def part(self, queries: slice, keys: slice) -> Tile:
        """The tile of these queries and keys, counted from the first ones of this tile."""
        distance = None if self.distance is None else self.distance + queries.start - keys.start
        return Tile(
            self.q_start + queries.start,
            self.q_start + queries.stop,
            self.k_start + keys.start,
            self.k_start + keys.stop,
            distance,
        )


class TileBatch(NamedTuple):
    """`num_tiles` tiles of one shape at equal steps, `first` and those behind it; no two have a query in common."""

    first: Tile
    num_tiles: int
    q_step: int
    k_step: int

    def queries(self, x: Tensor) -> Tensor:
        """The rows of queries in `x` `[Sq, ...]` as a view `[num_tiles, num_queries, ...]`."""
        return _ranges(x, self.first.q_start, self.first.num_queries, self.num_tiles, self.q_step)

    def keys(self, x: Tensor) -> Tensor:
        """The rows of keys in `x` `[Sk, ...]` as a view `[num_tiles, num_keys, ...]`, which may overlap."""
        return _ranges(x, self.first.k_start, self.first.num_keys, self.num_tiles, self.k_step)

    def add_to_keys(self, x: Tensor, addends: Tensor) -> None:
        """Add `[num_tiles, num_keys, ...]` to the rows of keys in `x`."""
        if self.k_step >= self.first.num_keys:
            self.keys(x).add_(addends)
            return
        for number, addend in enumerate(addends):
            start = self.first.k_start + number * self.k_step
            x[start : start + self.first.num_keys] += addend


def _ranges(x: Tensor, start: int, length: int, count: int, step: int) -> Tensor:
    return x.as_strided(
        (count, length, *x.shape[1:]),
        (step * x.stride(0), *x.stride()),
        x.storage_offset() + start * x.stride(0),
    )


def trimmed(tile: Tile, window: int | None) -> Tile | None:
    """The tile without queries that see none of its keys and without keys that no query sees; None if nothing is left.

    Its distance is None if every query sees every key.
    """
    num_queries, num_keys, distance = tile.num_queries, tile.num_keys, tile.distance
    if num_queries <= 0 or num_keys <= 0:
        return None
    if distance is None:
        return tile
    first, last = max(0, -distance), num_queries
    low, high = 0, min(num_keys, distance + num_queries)
    if window is not None:
        last = min(last, num_keys + window - 1 - distance)
        low = max(low, distance + first - window + 1)
        high = min(high, distance + last)
    if first >= last or low >= high:
        return None
    rest = tile.part(slice(first, last), slice(low, high))
    assert rest.distance is not None
    is_full = rest.distance >= rest.num_keys - 1 and not _is_cut(rest, window)
    return rest._replace(distance=None) if is_full else rest


def _is_cut(tile: Tile, window: int | None) -> bool:
    """Whether the window hides a key of the tile from one of its later queries."""
    return window is not None and tile.distance is not None and tile.distance + tile.num_queries > window


def row_bands(tile: Tile, window: int | None, size: int) -> Iterator[Tile]:
    """The tile in bands of at most `size` queries, each with the keys that these see."""
    for start in range(0, tile.num_queries, size):
        stop = min(start + size, tile.num_queries)
        band = trimmed(tile.part(slice(start, stop), slice(0, tile.num_keys)), window)
        if band is not None:
            yield band


def pieces(tiles: Iterable[Tile], window: int | None) -> Iterator[Tile]:
    """The tiles as full rectangles, causal squares and tiles with a mask.

    Without a window there are no masks. With one, the work of a tile is that of the visible scores and at most as much
    again, and masks have at most `_EDGE` squared elements.
    """
    for tile in tiles:
        rest = trimmed(tile, window)
        if rest is None:
            continue
        if not _is_cut(rest, window):
            yield from _causal_pieces(rest)
            continue
        assert window is not None
        if window <= _BAND:
            yield from row_bands(rest, window, _BAND)
            continue
        for band in row_bands(rest, window, min(window, _EDGE)):
            yield from _window_pieces(band, window)


def _causal_pieces(tile: Tile) -> Iterator[Tile]:
    """A trimmed tile in which no window ends: the keys before the diagonal, its square, and the queries after it."""
    num_queries, num_keys, before = tile.num_queries, tile.num_keys, tile.distance
    if before is None:
        yield tile
        return
    after = num_keys - before
    if before > 0:
        yield tile.part(slice(0, num_queries), slice(0, before))._replace(distance=None)
    yield tile.part(slice(0, after), slice(before, num_keys))
    if num_queries > after:
        yield tile.part(slice(after, num_queries), slice(before, num_keys))._replace(distance=None)


def _window_pieces(band: Tile, window: int) -> Iterator[Tile]:
    """A trimmed tile of at most `window` queries: the keys that the window hides from some of them, and the others."""
    if not _is_cut(band, window):
        yield from _causal_pieces(band)
        return
    assert band.distance is not None
    # The first key that the last query sees, which every query before it sees as well, unless it is after that query.
    border = min(band.distance + band.num_queries - window, band.num_keys)
    for keys in (slice(0, border), slice(border, band.num_keys)):
        part = trimmed(band.part(slice(0, band.num_queries), keys), window)
        if part is not None:
            yield from (part,) if _is_cut(part, window) else _causal_pieces(part)


def batches(tiles: Iterable[Tile]) -> list[TileBatch]:
    """Tiles of one shape that follow each other at equal steps as batches, which one call of a kernel computes."""
    by_shape: dict[tuple[int, int, int | None], list[Tile]] = {}
    for tile in tiles:
        by_shape.setdefault((tile.num_queries, tile.num_keys, tile.distance), []).append(tile)
    return [batch for same in by_shape.values() for batch in _progressions(same)]


def _progressions(tiles: Sequence[Tile]) -> Iterator[TileBatch]:
    at = 0
    while at < len(tiles):
        first, count, steps = tiles[at], 1, (0, 0)
        while at + count < len(tiles):
            before, tile = tiles[at + count - 1], tiles[at + count]
            own = (tile.q_start - before.q_start, tile.k_start - before.k_start)
            if own[0] < first.num_queries or own[1] < 0 or (count > 1 and own != steps):
                break
            steps, count = own, count + 1
        yield TileBatch(first, count, *steps)
        at += count


def needs_mask(tile: Tile, window: int | None) -> bool:
    """Whether a piece is neither a full rectangle nor a causal square."""
    return tile.distance is not None and (not tile.is_causal_square or _is_cut(tile, window))


def additive_mask(tile: Tile, window: int | None, like: Tensor) -> Tensor:
    """`[num_queries, num_keys]`: 0 where a query sees a key, else -inf; in the dtype and on the device of `like`."""
    assert tile.distance is not None
    mask = torch.full((tile.num_queries, tile.num_keys), -math.inf, dtype=like.dtype, device=like.device)
    mask.triu_(tile.distance + 1)
    if window is not None:
        mask += torch.full_like(mask, -math.inf).tril_(tile.distance - window)
    return mask
