"""Tokenizes rows of text or conversations while a run trains, as a stream of samples.

The token counts of rows are known only once they are tokenized, so sample g cannot be found without those before it.
The stream therefore has V shards, each a sequence of its own: sample g is sample g // V of shard g % V. A shard is read
in order from a cursor of four numbers, whatever the number of ranks and workers. Each sample carries the cursor behind
it; the loader notes the cursors of delivered samples, and a checkpoint merges those of all ranks.

A process that gets a sample of a shard whose cursor it does not know reads the shard from the last one that it knows.
With V a multiple of the samples of a step, as built, each shard is always read by the same rank, and there by the same
worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from internlm.data.packing.sample import Sample
from internlm.data.remote.fetch_ahead import FetchAhead, size_to_fetch
from internlm.data.rows.row_file import RowFile
from internlm.data.rows.shuffled_rows import ShuffledRows
from internlm.data.sources.row_encoder import RowEncoder
from internlm.data.sources.shard_reader import RowPacking, ShardCursor, ShardReader
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

_LONG_SKIP = 16
"""Samples of a shard to read and drop, after which a line of the log says so."""

logger = get_logger(__name__)


class RowStream:
    """A `SampleStream` over the rows of files, tokenized as they are needed.

    Args:
        files: of rows.
        type_ids: of the files.
        type_names: that type ids index.
        encoder: of rows.
        packing: of documents.
        num_shards: V above, unless a run resumes with another number, or there are fewer rows.
        seed: of the order.
        facts: what rows and tokens depend on besides, as JSON values.
        num_files: files whose rows are mixed at a time; None: all.

    Raises:
        DataError: the files have no row.
    """

    def __init__(
        self,
        files: Sequence[RowFile],
        type_ids: Sequence[int],
        type_names: list[str],
        encoder: RowEncoder,
        packing: RowPacking,
        *,
        num_shards: int,
        seed: int,
        facts: Mapping[str, Any],
        num_files: int | None = None,
    ) -> None:
        self.type_names = type_names
        self._files, self._type_ids, self._encoder, self._packing = files, type_ids, encoder, packing
        self._seed = seed
        self._num_files = num_files
        self._order = ShuffledRows(files, num_shards, seed, num_files)
        self._fetch_ahead = FetchAhead()
        size, bound = size_to_fetch(file.path for file in files)
        self._is_remote, self._fits_cache = size > 0, bound is None or size <= bound
        self._windows_seen: set[tuple[int, int]] = set()
        if self._order.num_rows == 0:
            raise DataError(f"{files[0].path.parent}: the {len(files):,} files have no row")
        self._facts = dict(facts)
        self._known: dict[int, tuple[int, ShardCursor]] = {}
        self._changed: set[int] = set()
        self._readers: dict[int, tuple[int, ShardReader]] = {}
        self._num_left_out = 0

    @property
    def facts(self) -> Mapping[str, Any]:
        """Everything that the samples depend on, but for the number of shards, which is in the state."""
        packing = self._packing
        return {
            **self._facts,
            "packing": packing.packing,
            "document_mask": packing.document_mask,
            "fim": None if packing.fim is None else packing.fim.facts,
            "seq_len": packing.seq_len,
            "micro_bsz": packing.micro_bsz,
            "min_lengths": list(packing.min_lengths),
            "num_rows": self._order.num_rows,
            "seed": self._seed,
            **({} if self._num_files is None else {"shuffle_files": self._num_files}),
        }

    @property
    def samples_per_epoch(self) -> None:
        """Not known: shards have epochs of their own."""
        return None

    @property
    def num_shards(self) -> int:
        """The number of shards."""
        return self._order.num_shards

    def sample(self, index: int) -> Sample:
        """See `SampleStream`."""
        number, shard = divmod(index, self.num_shards)
        at, reader = self._readers.get(shard, (number + 1, None))
        known, cursor = self._known.get(shard, (0, ShardCursor()))
        if reader is None or at > number or at < known <= number:
            if known > number:
                known, cursor = 0, ShardCursor()
            at, reader = known, self._reader(shard, cursor)
        if number - at > _LONG_SKIP:
            logger.info("shard %d: reading %d samples to get to sample %d", shard, number - at, index)
        if self._is_remote:
            self._request(shard, reader.cursor)
        for _ in range(number - at):
            reader.skip_sample()
        sample = reader.next_sample()
        self._readers[shard] = number + 1, reader
        return sample

    def shard_of(self, index: int) -> int:
        """See `SampleStream`."""
        return index % self.num_shards

    def padding(self) -> Sample:
        """See `SampleStream`."""
        return self._packing.padding()

    def note_delivered(self, indices: Sequence[int], cursors: Sequence[Any]) -> None:
        """See `SampleStream`."""
        for index, cursor in zip(indices, cursors, strict=True):
            # The samples of skipped steps are padding, which has no cursor.
            if cursor is not None:
                number, shard = divmod(index, self.num_shards)
                self._known[shard] = number + 1, ShardCursor.from_json(cursor)
                self._changed.add(shard)

    def state_at(self, index: int) -> dict[str, Any]:
        """See `SampleStream`; the cursors of the shards that this rank has read."""
        return self._state(self._changed)

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """See `SampleStream`."""
        merged = self._state(self._known)
        for state in states:
            for shard, entry in state["cursors"].items():
                if entry[0] > merged["cursors"].get(shard, (0,))[0]:
                    merged["cursors"][shard] = entry
        return merged

    def load_state(self, index: int, state: Mapping[str, Any]) -> list[str]:
        """See `SampleStream`."""
        self._readers, self._changed = {}, set()
        saved = state.get("num_shards", self.num_shards)
        if saved != self.num_shards:
            self._order = ShuffledRows(self._files, saved, self._seed, self._num_files)
        if "cursors" in state and saved == self.num_shards:
            self._known = {
                int(shard): (number, ShardCursor.from_json(cursor))
                for shard, (number, *cursor) in state["cursors"].items()
            }
            return []
        # Each shard starts at its beginning, with the number of its next sample.
        delivered = {shard: max(0, -(-(index - shard) // self.num_shards)) for shard in range(self.num_shards)}
        self._known = {shard: (number, ShardCursor()) for shard, number in delivered.items()}
        if not index:
            return []
        return [
            "The checkpoint has no position in these rows, as its data were others: they are read from the beginning"
        ]

    def progress_at(self, index: int) -> dict[str, float]:
        """See `SampleStream`; by the rows that samples have had in the shards that this rank has read."""
        num_samples = sum(number for number, _ in self._known.values())
        if num_samples == 0:
            return {}
        epochs = sum(self._order.progress(shard, cursor.position) for shard, (_, cursor) in self._known.items())
        return {"epoch": epochs / num_samples * index / self.num_shards}

    def _state(self, shards: Any) -> dict[str, Any]:
        cursors = {shard: self._known[shard] for shard in sorted(shards)}
        return {
            "num_shards": self.num_shards,
            "cursors": {str(shard): [number, *cursor.to_json()] for shard, (number, cursor) in cursors.items()},
        }

    def _reader(self, shard: int, cursor: ShardCursor) -> ShardReader:
        return ShardReader(
            shard,
            self._order,
            self._files,
            self._type_ids,
            self._encoder,
            self._packing,
            self._note_left_out,
            cursor,
        )

    def _request(self, shard: int, cursor: ShardCursor) -> None:
        """Fetch the files ahead that a shard will read: all, or those of its window and the next one."""
        window = self._order.window_of(shard, cursor.position)
        if window is not None and window not in self._windows_seen:
            # Shards are in the same window, or in two that follow each other.
            self._windows_seen = {each for each in self._windows_seen if each >= (window[0] - 1, 0)} | {window}
            self._fetch_ahead.request([self._files[number].path for number in self._order.files_from(window)])
        elif self._num_files is None and self._fits_cache and not self._fetch_ahead.is_started:
            self._fetch_ahead.request([file.path for file in self._files])

    def _note_left_out(self, place: str, reason: str) -> None:
        """Log the first rows that are left out, and then ever fewer of them."""
        self._num_left_out += 1
        if self._num_left_out <= 3 or self._num_left_out & (self._num_left_out - 1) == 0:
            logger.warning("%s is left out: %s (%d so far in this process)", place, reason, self._num_left_out)
