"""A blend: a stream that mixes other streams by weight.

Owns the state of the sources and what a resumed run keeps of another blend. Which source a sample comes from is decided
by `blend_order.py`. Must not know files.

All samples have the same number of token positions, so shares of samples are shares of tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from internlm.data.packing.sample import Sample
from internlm.data.sources.blend_changes import describe_changes, settings_of
from internlm.data.sources.blend_members import BlendGroup, BlendSource, share_of, sources_of
from internlm.data.sources.blend_order import BlendCursor, BlendOrder, BlendPosition
from internlm.data.sources.sample_stream import FiniteStream, StreamEndError
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

_OWN_FACTS = {"type", "seed", "num_samples_per_epoch"}
"""Facts that each source has for itself, even where they are equal."""


class BlendedStream:
    """The samples of several streams, mixed by weight; see `blend_order.py` for the order.

    Args:
        members: sources and groups.

    Attributes:
        type_names: of all sources. A type that several sources have is named `source/type` in each.
        samples_per_epoch: None, as each source has its own.
        sources: all sources, also those in groups, sorted by name.
        tokens_per_sample: token positions of a sample, padding included.

    Raises:
        ConfigError: two sources have the same name, all weights are 0, samples differ in size, or `epochs_max` is given
            for a stream without a number of samples per epoch.
    """

    _dealing: BlendCursor
    """Of `shard_of`."""
    _reading: BlendCursor
    """Of the process or thread that reads samples."""
    _delivered: BlendCursor
    """Of the consumer, which is behind."""

    def __init__(self, members: Sequence[BlendSource | BlendGroup]) -> None:
        found = list(sources_of(members))
        if not found:
            raise ConfigError("a blend needs at least one source")
        sizes = {source.name: source.stream.padding().input_ids.size for source in found}
        if len(set(sizes.values())) > 1:
            raise ConfigError(f"the sources of a blend have samples of different numbers of tokens: {sizes}")
        self.tokens_per_sample = sizes[found[0].name]
        self._order = BlendOrder([share_of(member, self.tokens_per_sample) for member in members])
        by_name = {source.name: source for source in found}
        self.sources = [by_name[share.name] for share in self._order.sources]
        self.samples_per_epoch = None
        self.type_names, self._first_types = _name_types(self.sources)
        self._absent: dict[str, Any] = {}
        """States of sources that an earlier run had, and this one has not."""
        self._start_at(self._order.beginning)

    @property
    def facts(self) -> Mapping[str, Any]:
        """The facts that all sources share; those of a source alone are in its state."""
        all_facts = [source.stream.facts for source in self.sources]
        return {
            name: value
            for name, value in all_facts[0].items()
            if name not in _OWN_FACTS and all(name in facts and facts[name] == value for facts in all_facts)
        }

    def source_at(self, index: int) -> tuple[str, int]:
        """The name of the source of sample `index`, and which sample of the source it is.

        Raises:
            StreamEndError: the blend ends before it.
        """
        number, own_index = _find(BlendCursor(self._order, self._position_before(index, self._origin)), index)
        return self.sources[number].name, own_index

    def sample(self, index: int) -> Sample:
        """See `SampleStream`. Its cursor is (number of the source, index in the source, cursor of the source)."""
        if index < self._reading.index:
            self._reading = BlendCursor(self._order, self._position_before(index, self._origin))
        number, own_index = _find(self._reading, index)
        sample = self.sources[number].stream.sample(own_index)
        return dataclasses.replace(
            sample,
            type_ids=sample.type_ids + self._first_types[number],
            cursor=(number, own_index, sample.cursor),
        )

    def shard_of(self, index: int) -> Hashable:
        """See `SampleStream`: the source, and the shard of the source; None where any process may read it."""
        if index < self._dealing.index:
            self._dealing = BlendCursor(self._order, self._position_before(index, self._origin))
        try:
            number, own_index = _find(self._dealing, index)
        except StreamEndError:
            return None
        shard = self.sources[number].stream.shard_of(own_index)
        return None if shard is None else (number, shard)

    def padding(self) -> Sample:
        """See `SampleStream`."""
        return self.sources[0].stream.padding()

    def why_ended(self, index: int) -> str | None:
        """See `FiniteStream`."""
        cursor = self._deliver_to(index)
        if cursor.index < index:
            return f"the blend ends after {cursor.index:,} samples: {cursor.end}"
        for source, count in zip(self.sources, cursor.counts, strict=True):
            if isinstance(source.stream, FiniteStream) and (reason := source.stream.why_ended(count)):
                return f"source '{source.name}': {reason}"
        return None

    def note_delivered(self, indices: Sequence[int], cursors: Sequence[Any]) -> None:
        """See `SampleStream`."""
        by_source: dict[int, tuple[list[int], list[Any]]] = {}
        for index, cursor in zip(indices, cursors, strict=True):
            if cursor is None:
                # Of a skipped step, which nothing has read.
                at = BlendCursor(self._order, self._position_before(index, self._previous, self._origin))
                cursor = (*_find(at, index), None)
            number, own_index, own_cursor = cursor
            own_indices, own_cursors = by_source.setdefault(number, ([], []))
            own_indices.append(own_index)
            own_cursors.append(own_cursor)
        for number, (own_indices, own_cursors) in by_source.items():
            self.sources[number].stream.note_delivered(own_indices, own_cursors)

    def state_at(self, index: int) -> dict[str, Any]:
        """See `SampleStream`: samples and state of each source, and the shares since the weights last changed."""
        position, schedule = self._deliver_to(index).position, self._order.schedule()
        sources = {
            source.name: {
                "samples": count,
                "settings": settings_of(source, schedule),
                "facts": dict(source.stream.facts),
                "stream": source.stream.state_at(count),
            }
            for source, count in zip(self.sources, position.counts, strict=True)
        }
        starts = zip(self.sources, position.start_counts, strict=True)
        return {
            "sources": {**self._absent, **sources},
            "start": position.start,
            "start_samples": {source.name: count for source, count in starts},
            "weights": {name: str(weight) for name, weight in position.weights.items()},
            "tokens_per_sample": self.tokens_per_sample,
        }

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See `SampleStream`."""
        sources = dict(states[0]["sources"])
        for source in self.sources:
            own = [state["sources"][source.name]["stream"] for state in states]
            sources[source.name] = {**sources[source.name], "stream": source.stream.merge_states(own)}
        return {**states[0], "sources": sources}

    def load_state(self, index: int, state: Mapping[str, Any]) -> list[str]:
        """See `SampleStream`. Sources are recognized by name.

        A source continues after its own samples, whatever else changed. If the weights in effect at `index` are those
        of the state, shares are counted as if there had been no interruption, otherwise from `index` on.
        """
        saved: dict[str, Any] = dict(state.get("sources", {}))
        names = {source.name for source in self.sources}
        notices = describe_changes(index, self.sources, self._order.schedule(), saved, self.facts.keys())
        counts = {name: int(saved[name]["samples"]) for name in names & saved.keys()}
        for source in self.sources:
            own_state = saved[source.name]["stream"] if source.name in saved else {}
            own_notices = source.stream.load_state(counts.get(source.name, 0), own_state)
            notices += [f"source '{source.name}': {notice}" for notice in own_notices]
        tokens = state.get("tokens_per_sample", self.tokens_per_sample)
        if tokens != self.tokens_per_sample:
            notices.append(
                f"a sample had {tokens:,} tokens, and has {self.tokens_per_sample:,}: the tokens of sources in "
                "metrics, and those at which weights change, count all samples of the run as of the new size"
            )
        self._absent = {name: {**saved[name], "is_absent": True} for name in saved.keys() - names}
        position = self._order.position(index, counts)
        weights = {name: Fraction(text) for name, text in state.get("weights", {}).items()}
        if weights and weights == self._order.weights_at(index, position.counts):
            start_counts = tuple(int(state["start_samples"].get(source.name, 0)) for source in self.sources)
            position = BlendPosition(index, position.counts, int(state["start"]), start_counts, weights)
        self._start_at(position)
        return notices

    def progress_at(self, index: int) -> dict[str, float]:
        """See `SampleStream`: `source/<name>/tokens`, and `source/<name>/epochs` where epochs are known."""
        progress: dict[str, float] = {}
        for source, count in zip(self.sources, self._deliver_to(index).counts, strict=True):
            progress[f"source/{source.name}/tokens"] = count * self.tokens_per_sample
            own = dict(source.stream.progress_at(count))
            if source.stream.samples_per_epoch is not None:
                own["epoch"] = count / source.stream.samples_per_epoch
            if "epoch" in own:
                progress[f"source/{source.name}/epochs"] = own.pop("epoch")
            progress |= {f"source/{source.name}/{metric}": value for metric, value in own.items()}
        return progress

    def _start_at(self, position: BlendPosition) -> None:
        self._origin = self._previous = position
        self._reading, self._dealing = BlendCursor(self._order, position), BlendCursor(self._order, position)
        self._delivered = BlendCursor(self._order, position)
        self._logged = -1

    def _position_before(self, index: int, *known: BlendPosition) -> BlendPosition:
        """The first of the known positions that is not after sample `index`."""
        return next((position for position in known if position.index <= index), self._order.beginning)

    def _deliver_to(self, index: int) -> BlendCursor:
        """The cursor of the consumer, moved to sample `index`."""
        if index < self._delivered.index:
            self._delivered = BlendCursor(self._order, self._position_before(index, self._previous, self._origin))
        else:
            self._previous = self._delivered.position
        self._delivered.advance_to(index)
        self._log_changes()
        return self._delivered

    def _log_changes(self) -> None:
        """Log each change of shares that the consumer has passed, once."""
        cursor = self._delivered
        for index, weights in cursor.changes:
            if index <= self._logged:
                continue
            self._logged = index
            ended = [
                f"'{source.name}' has ended after {source.epochs_max:g} epoch{'' if source.epochs_max == 1 else 's'}"
                for source, share, count in zip(self.sources, self._order.sources, cursor.counts, strict=True)
                if source.name not in weights and share.on_end == "drop" and count == share.limit
            ]
            logger.info(
                "blend: shares from sample %s (token %s) on: %s%s",
                f"{index:,}",
                f"{index * self.tokens_per_sample:,}",
                ", ".join(f"{name} {float(weight):.6g}" for name, weight in weights.items()) or "none",
                "".join(f"; {text}" for text in ended),
            )
        cursor.changes.clear()


def _find(cursor: BlendCursor, index: int) -> tuple[int, int]:
    """Move a cursor past sample `index`; the number of its source, and which sample of the source it is."""
    cursor.advance_to(index)
    found = cursor.take()
    if found is None:
        raise StreamEndError(f"the blend has no sample {index:,}: {cursor.end}")
    return found


def _name_types(sources: Sequence[BlendSource]) -> tuple[list[str], list[int]]:
    """Type names of a blend, and the id of the first type of each source."""
    found = Counter(name for source in sources for name in set(source.stream.type_names))
    names: list[str] = []
    first_types = []
    for source in sources:
        first_types.append(len(names))
        names += [name if found[name] == 1 else f"{source.name}/{name}" for name in source.stream.type_names]
    if shared := sorted(name for name, count in found.items() if count > 1):
        logger.info("blend: types that several sources have are named SOURCE/TYPE in metrics: %s", ", ".join(shared))
    return names, first_types
