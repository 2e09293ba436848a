"""Which keys of a sample a rank gathers from the other context ranks, and how its queries see them.

For attention whose keys are expanded after they have travelled: a rank needs all of them at once, straight from the
ranks that own them. They are put in the order of the sample, in which the keys that a piece of a document sees are
consecutive, so each piece is one tile. Integers only, as attention plans.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from internlm.core.parallel.context.attention_plan import Rows, union_of_rows
from internlm.core.parallel.context.token_cut import TokenRange
from internlm.core.parallel.context.token_pieces import TokenPieces
from internlm.model.ops.attention.partial_attention import Tile

MULTIPLE = 16
"""The number of keys is a multiple of it: GEMMs on them run in tiles, and those of float8 need whole ones."""


@dataclass(frozen=True)
class KeyGathering:
    """The keys that one rank gathers.

    Attributes:
        rank: context rank.
        num_tokens: that it owns.
        sends: other rank -> the own rows that it gathers.
        segments: the gathered keys in order: (owner, number of rows). Those of this rank are all its rows; those of
            another one are the rows that it sends.
        tiles: of this rank's queries; key rows are gathered ones.
    """

    rank: int
    num_tokens: int
    sends: dict[int, Rows]
    segments: tuple[tuple[int, int], ...]
    tiles: tuple[Tile, ...]

    @property
    def num_rows(self) -> int:
        """Number of gathered keys."""
        return sum(rows for _, rows in self.segments)

    @property
    def num_keys(self) -> int:
        """The same with padding behind them, which no query sees: a multiple of `MULTIPLE`."""
        return -(-self.num_rows // MULTIPLE) * MULTIPLE

    def sizes_of(self, source: int) -> list[int]:
        """Rows of each segment of a rank."""
        return [rows for owner, rows in self.segments if owner == source]

    @property
    def sources(self) -> list[int]:
        """The other ranks that send rows, ascending."""
        return sorted({owner for owner, _ in self.segments} - {self.rank})


def make_key_gathering(pieces: TokenPieces, rank: int, window: int | None) -> KeyGathering:
    """The keys that a rank gathers.

    Args:
        pieces: of the sample.
        rank: context rank.
        window: maximum number of keys that a query sees, itself included; None: no limit.
    """
    number, start = _needed(pieces, rank, window)
    rows = pieces.stop[number] - start
    first_row = np.cumsum(rows) - rows
    own = np.nonzero(pieces.rank == rank)[0]
    first_key = pieces.start[pieces.first[own]]
    if window is not None:
        first_key = np.maximum(first_key, pieces.start[own] - window + 1)
    place = np.searchsorted(start, first_key, side="right") - 1
    k_start = first_row[place] + first_key - start[place]
    columns = (
        pieces.local[own],
        pieces.local[own] + pieces.stop[own] - pieces.start[own],
        k_start,
        k_start + pieces.stop[own] - first_key,
        pieces.start[own] - first_key,
    )
    tiles = tuple(Tile(*row) for row in zip(*(column.tolist() for column in columns), strict=True))
    sends = {other: _rows_sent(pieces, rank, other, window) for other in range(pieces.num_ranks) if other != rank}
    return KeyGathering(
        rank,
        int((pieces.stop - pieces.start)[own].sum()),
        {other: own_rows for other, own_rows in sends.items() if own_rows},
        _segments(pieces.rank[number].tolist(), rows.tolist()),
        tiles,
    )


def _needed(pieces: TokenPieces, rank: int, window: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pieces of which a rank needs keys, its own included, and the first token that it needs of each.

    It needs all behind that: of the pieces before a query in its document, the end is the nearest.
    """
    own = np.nonzero(pieces.rank == rank)[0]
    following = np.append(own, len(pieces))[np.searchsorted(own, np.arange(len(pieces)))]
    number = np.nonzero(following < pieces.end)[0]
    start = pieces.start[number]
    if window is not None:
        start = np.maximum(start, pieces.start[following[number]] - window + 1)
    is_seen = start < pieces.stop[number]
    return number[is_seen], start[is_seen]


def _rows_sent(pieces: TokenPieces, rank: int, receiver: int, window: int | None) -> Rows:
    number, start = _needed(pieces, receiver, window)
    is_own = pieces.rank[number] == rank
    number, start = number[is_own], start[is_own]
    offset = pieces.local[number] - pieces.start[number]
    columns = ((start + offset).tolist(), (pieces.stop[number] + offset).tolist())
    return union_of_rows([TokenRange(*row) for row in zip(*columns, strict=True)])


def _segments(owners: list[int], rows: list[int]) -> tuple[tuple[int, int], ...]:
    """Consecutive parts of one rank are one segment."""
    result: list[tuple[int, int]] = []
    for owner, number in zip(owners, rows, strict=True):
        if result and result[-1][0] == owner:
            result[-1] = owner, result[-1][1] + number
        else:
            result.append((owner, number))
    return tuple(result)
