"""Decides which source each sample of a blend comes from, without random draws.

Chairman assignment (R. Tijdeman, "The chairman assignment problem in the theory of social decisions", 1980): among n
sources, the number of samples from each differs from weight * samples by at most 1 - 1/(2n - 2), at every sample since
the weights last changed. Sample k of a source (from 0) may be taken as soon as weight * samples >= k + 1/(2n - 2) and
must be taken before it exceeds k + 1 - 1/(2n - 2); of those that may, the most urgent is taken.

The state is the number of samples of each source, now and at the last change of weights, so it can be saved, and whole
periods of the weights are skipped at once. Must not know samples or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from internlm.utils.errors import ConfigError

Weights = Mapping[str, Fraction]
"""Name of a source -> its share of the samples; the shares add up to 1, and none is 0."""


@dataclass(frozen=True)
class SourceShare:
    """How much of a blend is of one source.

    Attributes:
        name: of the source.
        weights: (first sample, weight) in ascending order, the first at sample 0.
        limit: number of its samples after which it has ended; None: it never does.
        on_end: "drop" continues with the other sources, "stop" ends the blend.
    """

    name: str
    weights: tuple[tuple[int, Fraction], ...]
    limit: int | None = None
    on_end: Literal["stop", "drop"] = "stop"


@dataclass(frozen=True)
class GroupShare:
    """Sources that share the weight of their group in proportion to their own weights.

    Attributes:
        weights: see `SourceShare`.
        members: sources and groups.
    """

    weights: tuple[tuple[int, Fraction], ...]
    members: tuple[SourceShare | GroupShare, ...]


@dataclass(frozen=True)
class BlendPosition:
    """The state of a blend between two samples.

    Attributes:
        index: the next sample of the blend.
        counts: samples of each source so far, in the order of `BlendOrder.sources`.
        start: the sample at which the weights last changed.
        start_counts: `counts` at `start`.
        weights: in effect since `start`; empty at the beginning of a run.
    """

    index: int
    counts: tuple[int, ...]
    start: int
    start_counts: tuple[int, ...]
    weights: Weights


class BlendOrder:
    """The weights of the sources of a blend.

    Args:
        members: sources and groups of the blend.

    Attributes:
        sources: all sources, sorted by name, so that the order in `members` decides nothing.

    Raises:
        ConfigError: two sources have the same name, or all weights are 0 at some sample.
    """

    def __init__(self, members: Sequence[SourceShare | GroupShare]) -> None:
        self._root = GroupShare(((0, Fraction(1)),), tuple(members))
        self.sources = tuple(sorted(_leaves(self._root), key=lambda source: source.name))
        self.numbers = {source.name: number for number, source in enumerate(self.sources)}
        if len(self.numbers) < len(self.sources):
            raise ConfigError(f"a blend has several sources of one name: {[source.name for source in self.sources]}")
        self._changes = sorted(set(_changes(self._root)))
        for index, weights in self.schedule():
            if not weights:
                raise ConfigError(f"all weights of the blend are 0 from sample {index:,} on: give one above 0")

    @property
    def beginning(self) -> BlendPosition:
        """The position before the first sample."""
        return self.position(0, {})

    def position(self, index: int, counts: Mapping[str, int]) -> BlendPosition:
        """The position before sample `index` of sources with `counts` samples, at which new weights come into effect.

        Args:
            index: of the blend.
            counts: by name; a source that is not named starts at its first sample.
        """
        ordered = tuple(counts.get(source.name, 0) for source in self.sources)
        return BlendPosition(index, ordered, index, ordered, {})

    def weights_at(self, index: int, counts: Sequence[int]) -> Weights:
        """Weights of sample `index`; a source that has ended with `counts` samples, and is dropped, has none.

        Empty if no source is left.
        """
        dropped = {
            source.name
            for source, count in zip(self.sources, counts, strict=True)
            if source.on_end == "drop" and source.limit is not None and count >= source.limit
        }
        return _weights_of(self._root, index, dropped)

    def schedule(self) -> list[tuple[int, Weights]]:
        """(first sample, weights) of each change by the schedule, while no source has ended."""
        return [(index, self.weights_at(index, (0,) * len(self.sources))) for index in self._changes]

    def next_change(self, index: int) -> int | None:
        """The first sample after `index` from which a weight differs by the schedule; None if there is none."""
        return next((change for change in self._changes if change > index), None)


class BlendCursor:
    """Moves through the samples of a blend in ascending order.

    Args:
        order: of the blend.
        position: where to start.

    Attributes:
        index: the next sample of the blend.
        counts: samples of each source so far.
        end: why there is no sample `index`; None if there is one.
        changes: (first sample, weights) of each change of weights that the cursor has passed.
    """

    def __init__(self, order: BlendOrder, position: BlendPosition) -> None:
        self._order = order
        self.index, self.counts = position.index, list(position.counts)
        self._start, self._start_counts = position.start, list(position.start_counts)
        self._weights = position.weights
        self.end: str | None = None
        self.changes: list[tuple[int, Weights]] = []
        self._limits = [source.limit for source in order.sources]
        self._plan()
        self._find_weights()

    @property
    def position(self) -> BlendPosition:
        """The present position."""
        return BlendPosition(self.index, tuple(self.counts), self._start, tuple(self._start_counts), self._weights)

    def advance_to(self, index: int) -> None:
        """Move to sample `index`, or to the end of the blend if that is before it."""
        self._skip_periods(index)
        while self.index < index and self.end is None:
            self.take()

    def take(self) -> tuple[int, int] | None:
        """Move by one sample.

        Returns:
            The number of its source in `BlendOrder.sources`, and which sample of the source it is; None at the end.
        """
        if self.end is not None:
            return None
        source = self._most_urgent()
        count, limit = self.counts[source], self._limits[source]
        if count == limit:
            name = self._order.sources[source].name
            self.end = f"source '{name}' has ended after {count:,} samples, and on_end = 'stop'"
            return None
        self.index += 1
        self.counts[source] = count + 1
        self._set_window(source)
        if self.index == self._until or count + 1 == limit:
            self._find_weights()
        return source, count

    def _most_urgent(self) -> int:
        time, best, earliest = self.index - self._start + 1, -1, None
        for source in self._active:
            deadline = self._deadlines[source]
            if self._releases[source] <= time and (earliest is None or deadline < earliest):
                best, earliest = source, deadline
        return best

    def _find_weights(self) -> None:
        """Compute the weights of sample `index`; if they differ, shares are counted from here."""
        weights = self._order.weights_at(self.index, self.counts)
        self._until = self._order.next_change(self.index)
        if not weights:
            self.end = "every source with a weight has ended"
        if weights == self._weights:
            return
        self._weights = weights
        self._start, self._start_counts = self.index, list(self.counts)
        self.changes.append((self.index, weights))
        self._plan()

    def _plan(self) -> None:
        """Compute when the next sample of each source may and must be taken."""
        self._active = [self._order.numbers[name] for name in sorted(self._weights)]
        self._period = math.lcm(*(weight.denominator for weight in self._weights.values()))
        self._parts = [0] * len(self.counts)
        self._releases, self._deadlines = [0] * len(self.counts), [0] * len(self.counts)
        for name, weight in self._weights.items():
            source = self._order.numbers[name]
            self._parts[source] = int(weight * self._period)
            self._set_window(source)

    def _set_window(self, source: int) -> None:
        """Times since the last change of weights, from 1, between which the next sample of a source is taken."""
        if len(self._active) == 1:
            return  # released at 0
        scale = 2 * len(self._active) - 2
        taken = scale * (self.counts[source] - self._start_counts[source])
        divisor = scale * self._parts[source]
        self._releases[source] = -(-(taken + 1) * self._period // divisor)
        self._deadlines[source] = (taken + scale - 1) * self._period // divisor + 1

    def _skip_periods(self, index: int) -> None:
        """Skip whole periods, after which all shares are exact again, as far as no weight changes on the way."""
        while self.end is None and index - self.index >= self._period:
            stop = index if self._until is None else min(index, self._until - 1)
            periods = (stop - self.index) // self._period
            for source in self._active:
                limit = self._limits[source]
                if limit is not None:
                    periods = min(periods, (limit - self.counts[source] - 1) // self._parts[source])
            if periods > 0:
                self.index += periods * self._period
                for source in self._active:
                    self.counts[source] += periods * self._parts[source]
                    self._set_window(source)
            if self.index == index:
                return
            # One by one to the end of the period, or to the change of weights.
            last = min(index, self.index + self._period)
            while self.index < last and self.end is None:
                self.take()


def to_fraction(weight: float | Fraction) -> Fraction:
    """A weight as the number that its decimal notation shows: 0.1 is 1/10."""
    return weight if isinstance(weight, Fraction) else Fraction(repr(float(weight)))


def _leaves(group: GroupShare) -> Iterator[SourceShare]:
    for member in group.members:
        if isinstance(member, SourceShare):
            yield member
        else:
            yield from _leaves(member)


def _changes(group: GroupShare) -> Iterator[int]:
    for member in group.members:
        yield from (index for index, _ in member.weights)
        if isinstance(member, GroupShare):
            yield from _changes(member)


def _weights_of(group: GroupShare, index: int, dropped: set[str]) -> dict[str, Fraction]:
    """The share of each source in a group; empty if none has a weight."""
    parts: list[tuple[Fraction, dict[str, Fraction]]] = []
    for member in group.members:
        weight = next(weight for first, weight in reversed(member.weights) if first <= index)
        if isinstance(member, GroupShare):
            inside = _weights_of(member, index, dropped)
        else:
            inside = {} if member.name in dropped else {member.name: Fraction(1)}
        if weight > 0 and inside:
            parts.append((weight, inside))
    total = sum((weight for weight, _ in parts), Fraction(0))
    return {name: weight / total * share for weight, inside in parts for name, share in inside.items()}
