"""What one rank computes, sends and receives for the attention of a sample that is dealt to context ranks.

A plan is made on the host from document lengths, a cut, a movement and a sliding window. It holds integers only; the
executor runs any plan, forward and backward, and the simulator checks plans without processes.
"""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from internlm.core.parallel.context.movement import Movement, Transfer
from internlm.core.parallel.context.token_cut import TokenRange
from internlm.core.parallel.context.token_pieces import TokenPieces, ranges_between
from internlm.model.ops.attention.partial_attention import Tile

Rows = tuple[TokenRange, ...]
"""Ranges of rows, ascending and disjoint."""


class BlockMessage(NamedTuple):
    """A block that travels between this rank and another.

    Attributes:
        source: the rank that owns the keys.
        peer: the other rank.
        arrival: the step before whose computation the receiver waits for it.
    """

    source: int
    peer: int
    arrival: int


class Computation(NamedTuple):
    """The attention of this rank's queries to the keys of one rank.

    Attributes:
        source: the rank that owns the keys.
        tiles: key rows are those of the block that has travelled, or of all own keys if `source` is this rank.
    """

    source: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class PlanStep:
    """What happens in a step, in this order: blocks arrive, key messages start, tiles are computed, gradients start.

    Attributes:
        computations: by source.
        key_sends, key_receives: start before the computations; also in backward.
        gradient_sends: start after the computations, in backward.
        gradient_receives: likewise.
    """

    computations: tuple[Computation, ...]
    key_sends: tuple[BlockMessage, ...]
    key_receives: tuple[BlockMessage, ...]
    gradient_sends: tuple[BlockMessage, ...]
    gradient_receives: tuple[BlockMessage, ...]


@dataclass(frozen=True)
class AttentionPlan:
    """The steps of one rank.

    Attributes:
        rank: context rank.
        num_tokens: that it owns.
        steps: see `PlanStep`.
        rows: (source, other rank) -> the rows of the source that travel to the other rank, and whose gradients travel
            back, for each pair that this rank needs to know.
    """

    rank: int
    num_tokens: int
    steps: tuple[PlanStep, ...]
    rows: dict[tuple[int, int], Rows]

    @cached_property
    def released(self) -> tuple[tuple[int, ...], ...]:
        """By step, the other ranks whose keys are neither computed with nor sent behind it."""
        last: dict[int, int] = {}
        for number, step in enumerate(self.steps):
            for source in (*(each.source for each in step.computations), *(each.source for each in step.key_sends)):
                last[source] = number
        return tuple(
            tuple(source for source, step in last.items() if step == number and source != self.rank)
            for number in range(len(self.steps))
        )

    def rows_of(self, message: BlockMessage) -> Rows:
        """The rows of the source that are in a message."""
        return self.rows[message.source, self.rank if message.source == message.peer else message.peer]

    def rows_held(self, source: int) -> Rows:
        """The rows of another rank's block that this rank holds."""
        return self.rows[source, self.rank]


def num_rows(rows: Rows) -> int:
    """Total number of rows."""
    return sum(stop - start for start, stop in rows)


def make_plan(pieces: TokenPieces, movement: Movement, rank: int, window: int | None) -> AttentionPlan:
    """The plan of one rank.

    Args:
        pieces: of the sample.
        movement: of its keys.
        rank: context rank.
        window: maximum number of keys that a query sees, itself included; None: no limit.
    """
    tiles = _tiles_by_source(pieces, rank, window)
    if movement.passes_on:
        rows = _rows_passed_on(pieces, window)
        keys, gradients = _needed_transfers(movement, pieces.needed(), {source for source, _ in rows})
    else:
        rows = _rows_sent(pieces, rank, window) | {
            (source, rank): union_of_rows([TokenRange(tile.k_start, tile.k_stop) for tile in own])
            for source, own in tiles.items()
            if source != rank
        }
        keys = [transfer for transfer in movement.keys if (transfer.source, transfer.receiver) in rows]
        gradients = [transfer for transfer in movement.gradients if (transfer.source, transfer.sender) in rows]
    steps = []
    for number in range(movement.num_steps):
        sources = movement.sources[rank][number] if number < len(movement.sources[rank]) else ()
        computations = tuple(
            Computation(
                source, _merged(tiles[source] if source == rank else _in_block(tiles[source], rows[source, rank]))
            )
            for source in sources
            if source in tiles
        )
        steps.append(PlanStep(computations, *_messages(keys, rank, number), *_messages(gradients, rank, number)))
    return AttentionPlan(rank, int((pieces.stop - pieces.start)[pieces.rank == rank].sum()), tuple(steps), rows)


def _tiles_by_source(pieces: TokenPieces, rank: int, window: int | None) -> dict[int, list[Tile]]:
    """The tiles of a rank's queries, by owner of the keys; key rows are local to their owner."""
    own = np.nonzero(pieces.rank == rank)[0]
    i, k = ranges_between(pieces.first[own], own + 1)
    q = own[i]
    q_start, q_stop = pieces.start[q], pieces.stop[q]
    k_start, k_stop = pieces.start[k], pieces.stop[k]
    is_masked = q == k
    if window is not None:
        k_start = np.where(q == k, k_start, np.maximum(k_start, q_start - window + 1))
        q_stop = np.where(q == k, q_stop, np.minimum(q_stop, k_stop - 1 + window))
        is_masked |= q_stop - 1 - k_start >= window
    columns = (
        pieces.rank[k],
        pieces.local[q],
        pieces.local[q] + q_stop - q_start,
        pieces.local[k] + k_start - pieces.start[k],
        pieces.local[k] + k_stop - pieces.start[k],
        np.where(is_masked, q_start - k_start, -1),
    )
    tiles: dict[int, list[Tile]] = defaultdict(list)
    for source, *rows, distance in zip(*(column[k_start < k_stop].tolist() for column in columns), strict=True):
        first_q, last_q, first_k, last_k = rows
        tiles[source].append(Tile(first_q, last_q, first_k, last_k, None if distance < 0 else distance))
    return dict(tiles)


def _rows_sent(pieces: TokenPieces, rank: int, window: int | None) -> dict[tuple[int, int], Rows]:
    """The own rows that each other rank needs."""
    own = np.nonzero(pieces.rank == rank)[0]
    j, q = ranges_between(own + 1, pieces.end[own])
    k = own[j]
    start, stop = pieces.start[k], pieces.stop[k]
    if window is not None:
        start = np.maximum(start, pieces.start[q] - window + 1)
    is_needed = (pieces.rank[q] != rank) & (start < stop)
    offset = pieces.local[k] - pieces.start[k]
    ranges: dict[int, list[TokenRange]] = defaultdict(list)
    columns = (pieces.rank[q], start + offset, stop + offset)
    for receiver, first, last in zip(*(column[is_needed].tolist() for column in columns), strict=True):
        ranges[receiver].append(TokenRange(first, last))
    return {(rank, receiver): union_of_rows(own_rows) for receiver, own_rows in ranges.items()}


def _rows_passed_on(pieces: TokenPieces, window: int | None) -> dict[tuple[int, int], Rows]:
    """The rows of each rank that any other rank needs, the same for all."""
    # Behind a piece in a document there is a piece of another rank, or none.
    is_seen = np.arange(len(pieces)) + 1 < pieces.end
    start = pieces.start if window is None else np.maximum(pieces.start, pieces.stop - window + 1)
    offset = pieces.local - pieces.start
    ranges: dict[int, list[TokenRange]] = defaultdict(list)
    is_seen &= start < pieces.stop
    columns = (pieces.rank, start + offset, pieces.stop + offset)
    for source, first, last in zip(*(column[is_seen].tolist() for column in columns), strict=True):
        ranges[source].append(TokenRange(first, last))
    unions = {source: union_of_rows(own) for source, own in ranges.items()}
    return {(source, other): rows for source, rows in unions.items() for other in range(pieces.num_ranks)}


def _needed_transfers(
    movement: Movement, needed: NDArray[np.bool_], sources: set[int]
) -> tuple[list[Transfer], list[Transfer]]:
    """Transfers of blocks that are passed on, without those of which no rank has a use.

    Args:
        movement: of all blocks.
        needed: `[c, c]`: whether keys of the first rank are before queries of the second.
        sources: with rows that travel.
    """
    useful = {(s, r) for s in sources for r in range(movement.num_ranks) if needed[s, r]}
    keys = []
    for transfer in sorted(movement.keys, key=lambda each: -each.step):
        if (transfer.source, transfer.receiver) in useful:
            # The sender has a use of the block: this one.
            useful.add((transfer.source, transfer.sender))
            keys.append(transfer)
    contributing = {(s, r) for s in sources for r in range(movement.num_ranks) if needed[s, r]}
    gradients = []
    for transfer in sorted(movement.gradients, key=lambda each: each.step):
        if (transfer.source, transfer.sender) in contributing:
            contributing.add((transfer.source, transfer.receiver))
            gradients.append(transfer)
    return keys, gradients


def _messages(
    transfers: Sequence[Transfer], rank: int, step: int
) -> tuple[tuple[BlockMessage, ...], tuple[BlockMessage, ...]]:
    """Sends and receives of a rank that start in a step."""
    started = [transfer for transfer in transfers if transfer.step == step]
    sends = tuple(BlockMessage(t.source, t.receiver, t.arrival) for t in started if t.sender == rank)
    receives = tuple(BlockMessage(t.source, t.sender, t.arrival) for t in started if t.receiver == rank)
    return sends, receives


def union_of_rows(ranges: Sequence[TokenRange]) -> Rows:
    """The same rows as ascending, disjoint and not adjacent ranges."""
    result: list[TokenRange] = []
    for start, stop in sorted(ranges):
        if result and start <= result[-1].stop:
            result[-1] = TokenRange(result[-1].start, max(stop, result[-1].stop))
        else:
            result.append(TokenRange(start, stop))
    return tuple(result)


def _in_block(tiles: Sequence[Tile], rows: Rows) -> list[Tile]:
    """Tiles whose keys are rows of their owner -> the same tiles with rows of a block."""
    starts = [row.start for row in rows]
    sizes = [row.stop - row.start for row in rows]
    offsets = [before - start for before, start in zip(itertools.accumulate(sizes, initial=0), starts, strict=False)]
    result = []
    for tile in tiles:
        offset = offsets[bisect.bisect_right(starts, tile.k_start) - 1]
        result.append(tile._replace(k_start=tile.k_start + offset, k_stop=tile.k_stop + offset))
    return result


def _merged(tiles: Sequence[Tile]) -> tuple[Tile, ...]:
    """Fewer, larger tiles: neighbours without a mask are joined along their keys, then along their queries."""
    masked = [tile for tile in tiles if tile.distance is not None]
    full: list[Tile] = []
    for tile in sorted(tile for tile in tiles if tile.distance is None):
        last = full[-1] if full else None
        if last is not None and last[:2] == tile[:2] and last.k_stop == tile.k_start:
            full[-1] = last._replace(k_stop=tile.k_stop)
        else:
            full.append(tile)
    joined: list[Tile] = []
    for tile in sorted(full, key=lambda each: (each.k_start, each.k_stop, each.q_start)):
        last = joined[-1] if joined else None
        if last is not None and last[2:4] == tile[2:4] and last.q_stop == tile.q_start:
            joined[-1] = last._replace(q_stop=tile.q_stop)
        else:
            joined.append(tile)
    return (*masked, *joined)
