"""The train loader: an infinite stream of batches whose whole state is a cursor.

Owns the assignment of samples to steps and ranks, prefetching, and the cursor. Must not know how samples are made.

Step t consumes the global sample indices [cursor, cursor + G), G = micro_num(t) * data_size; data rank r takes
[cursor + r * micro_num(t), cursor + (r + 1) * micro_num(t)). The global batch depends on data_size only through G, and
not on the number of workers. A batch may span two epochs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internlm.data.batch import Batch
from internlm.data.images.loading import ImageLoader
from internlm.data.loaders.batch_plan import NO_SKIPS, RampUp, SkipBatches, parse_skip_batches
from internlm.data.loaders.read_ahead import ReadAheadThread, WorkerProcesses
from internlm.data.packing.collate import to_micro_batch
from internlm.data.packing.sample import Sample
from internlm.data.sources.sample_stream import FiniteStream, NoDocumentsError, SampleStream, StreamEndError
from internlm.utils.errors import ConfigError, DataError, RemoteDataError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

_CURSOR_KEYS = {"step", "consumed_samples", "stream"}
"""Of a state, beside the facts of the stream."""


@dataclass(frozen=True)
class _StepPlan:
    """The samples of one rank in one step: global sample indices [first, first + count).

    Attributes:
        num_samples: of all ranks.
    """

    step: int
    first: int
    count: int
    num_samples: int

    @property
    def indices(self) -> range:
        """Global sample indices of this rank."""
        return range(self.first, self.first + self.count)


def build_train_loader(
    stream: SampleStream,
    *,
    micro_num: int,
    data_rank: int = 0,
    data_size: int = 1,
    num_workers: int = 0,
    rampup_batch_size: str = "",
    skip_batches: str = "",
    total_steps: int | None = None,
    pin_memory: bool = False,
    prefetch: int = 2,
    images: ImageLoader | None = None,
) -> TrainLoader:
    """Build a loader over the samples of a stream.

    Args:
        stream: see `SampleStream`; `ShuffledSource` makes one of a `SampleSource`.
        micro_num: micro-batches of a step on each data rank, after the ramp-up.
        data_rank, data_size: this data rank, and the number of data ranks.
        num_workers: number of prefetching processes; 0 prefetches in a thread of this process.
        rampup_batch_size: "start increment steps", see `RampUp`.
        skip_batches: steps, counted from 0, whose batch is padding and is not read; see `parse_skip_batches`.
        total_steps: the loader stops before this step; None never stops.
        pin_memory: whether to put tensors into page-locked memory (requires CUDA).
        prefetch: number of batches to prefetch; 0, without workers, reads each batch on demand.
        images: reads the pictures of samples; None without a vision tower.

    Raises:
        ConfigError: an argument is out of range.
    """
    return TrainLoader(
        stream,
        ramp_up=RampUp.parse(rampup_batch_size, micro_num),
        skipped=parse_skip_batches(skip_batches),
        data_rank=data_rank,
        data_size=data_size,
        num_workers=num_workers,
        total_steps=total_steps,
        pin_memory=pin_memory,
        prefetch=prefetch,
        images=images,
    )


class TrainLoader:
    """An iterator over this rank's `Batch` of each step, for one consumer; not thread-safe.

    Attributes:
        type_names: the names that `MicroBatch.type_ids` index.
        num_samples_per_epoch: samples of one epoch, over all ranks; None where the stream knows none.
        step: the next step to deliver, counted from 0.
        consumed_samples: samples, over all ranks, of the batches delivered so far; prefetching does not advance it.
    """

    def __init__(
        self,
        stream: SampleStream,
        *,
        ramp_up: RampUp,
        skipped: SkipBatches = NO_SKIPS,
        data_rank: int = 0,
        data_size: int = 1,
        num_workers: int = 0,
        total_steps: int | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
        images: ImageLoader | None = None,
    ) -> None:
        if not 0 <= data_rank < data_size:
            raise ConfigError(f"data_rank = {data_rank} is not in [0, data_size = {data_size})")
        self.type_names = stream.type_names
        self.num_samples_per_epoch = stream.samples_per_epoch
        self.step = 0
        self.consumed_samples = 0
        self._stream = stream
        self._read = _ReadSample(stream, skipped, images)
        self._num_unreadable = self._num_truncated_answers = 0
        self._ramp_up = ramp_up
        self._data_rank, self._data_size = data_rank, data_size
        self._num_workers, self._prefetch = num_workers, prefetch
        self._total_steps, self._pin_memory = total_steps, pin_memory
        reserved = stream.facts.keys() & _CURSOR_KEYS
        if reserved:
            raise ValueError(
                f"a source must not name its facts {sorted(reserved)}: the loader saves values of these names"
            )
        self._order_facts = {**stream.facts, **({} if images is None else images.facts)}
        self._batches: Iterator[Batch] | None = None
        self._stop: Callable[[], None] | None = None

    def micro_num_at(self, step: int) -> int:
        """Micro-batches of step `step` on each data rank."""
        return self._ramp_up.micro_num_at(step)

    def __iter__(self) -> TrainLoader:
        """Return the loader itself: iterating again continues at the cursor."""
        return self

    def __next__(self) -> Batch:
        """Deliver the batch of the next step.

        Raises:
            DataError: a document of the batch is malformed.
            StopIteration: `total_steps` is reached, or the stream ends within the batches of this step on all ranks.
        """
        if self._total_steps is not None and self.step >= self._total_steps:
            self.close()
            raise StopIteration
        if isinstance(self._stream, FiniteStream):
            following = self.consumed_samples + self.micro_num_at(self.step) * self._data_size
            if (reason := self._stream.why_ended(following)) is not None:
                logger.warning("the training data ends at step %d: %s", self.step, reason)
                self.close()
                raise StopIteration
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = next(self._batches)
        except BaseException:
            self.close()
            raise
        self.step += 1
        self.consumed_samples += batch.num_samples
        self._stream.note_delivered(batch.sample_indices, batch.cursors)
        self._log_defects(batch)
        return batch

    def seek(self, step: int, consumed_samples: int) -> None:
        """Continue with the batch of `step`, which starts at global sample index `consumed_samples`."""
        self.close()
        self.step, self.consumed_samples = step, consumed_samples

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor and the facts on which the order of samples depends."""
        return {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "stream": self._stream.state_at(self.consumed_samples),
            **self._order_facts,
        }

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state of all data ranks, of which each has delivered its own samples."""
        return {**states[0], "stream": self._stream.merge_states([state["stream"] for state in states])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the cursor of a state of `merge_states`, with a warning if the data or the order has changed."""
        consumed_samples = int(state["consumed_samples"])
        notices = self._stream.load_state(consumed_samples, state.get("stream", {}))
        changed = {
            name: (state[name], value) for name, value in self._order_facts.items() if state.get(name, value) != value
        }
        if changed and self._data_rank == 0:
            logger.warning(
                "The order of samples differs from that of the checkpoint (%s): training continues at sample %d of the "
                "new order, so this epoch may repeat some documents and miss others",
                ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items()),
                state["consumed_samples"],
            )
        if self._data_rank == 0:
            for notice in notices:
                logger.info("%s", notice)
        self.seek(int(state["step"]), consumed_samples)

    def progress_at(self, consumed_samples: int) -> dict[str, float]:
        """Tokens and epochs of each source after that many samples, by name of a metric; empty for a single source."""
        return self._stream.progress_at(consumed_samples)

    def close(self) -> None:
        """Stop prefetching. The cursor is kept; the next request for a batch starts prefetching again."""
        self._batches = None
        if self._num_truncated_answers > 1:
            logger.warning(
                "data rank %d: %d of the documents read lost every label by truncation at data.seq_len",
                self._data_rank,
                self._num_truncated_answers,
            )
        self._num_truncated_answers = 0
        if self._stop is not None:
            self._stop()
            self._stop = None

    def _log_defects(self, batch: Batch) -> None:
        """Log the unreadable documents and truncated answers of a delivered batch."""
        for message in batch.unreadable:
            self._num_unreadable += 1
            logger.warning(
                "step %d: skipped an unreadable document (data.on_bad_data = 'skip'; %d so far on data rank %d): %s",
                self.step,
                self._num_unreadable,
                self._data_rank,
                message,
            )
        if batch.num_truncated_answers and not self._num_truncated_answers:
            logger.warning(
                "step %d: %d unpacked document(s) have no label left after truncation at data.seq_len = %s: their "
                "answers are lost (later ones are only counted). Raise data.seq_len or shorten the prompts",
                self.step,
                batch.num_truncated_answers,
                self._order_facts.get("seq_len"),
            )
        self._num_truncated_answers += batch.num_truncated_answers

    def _start(self) -> Iterator[Batch]:
        plans = functools.partial(
            _step_plans,
            self.step,
            self.consumed_samples,
            self._ramp_up,
            self._data_rank,
            self._data_size,
            self._total_steps,
        )
        requests = functools.partial(_requests, plans)
        if self._num_workers > 0:
            workers = WorkerProcesses(self._read, requests, self._num_workers, self._read.group)
            thread = ReadAheadThread(_to_batches(plans(), workers, self._pin_memory), max(1, self._prefetch))
            # Finalizers also run when the loader is garbage-collected or the interpreter exits. Workers stop first: the
            # thread may be waiting for them.
            self._stop = weakref.finalize(self, _stop_all, workers, thread)
            return thread
        batches = _to_batches(plans(), map(self._read, requests()), self._pin_memory)
        if self._prefetch == 0:
            return batches
        thread = ReadAheadThread(batches, self._prefetch)
        self._stop = weakref.finalize(self, _stop_all, thread)
        return thread


def _stop_all(*running: ReadAheadThread[Any] | WorkerProcesses[Any]) -> None:
    for each in running:
        each.stop()


def _step_plans(
    step: int, cursor: int, ramp_up: RampUp, rank: int, size: int, total_steps: int | None
) -> Iterator[_StepPlan]:
    while total_steps is None or step < total_steps:
        count = ramp_up.micro_num_at(step)
        yield _StepPlan(step, cursor + rank * count, count, count * size)
        cursor += count * size
        step += 1


def _requests(plans: Callable[[], Iterator[_StepPlan]]) -> Iterator[tuple[int, int]]:
    """(step, global sample index) of each sample of this rank."""
    for plan in plans():
        for index in plan.indices:
            yield plan.step, index


class _ReadSample:
    """Reads the sample of a request, except one of a skipped step, which may be unreadable."""

    def __init__(self, stream: SampleStream, skipped: SkipBatches, images: ImageLoader | None) -> None:
        self.stream, self.skipped, self.images = stream, skipped, images

    def __call__(self, request: tuple[int, int]) -> Sample:
        step, index = request
        if self.skipped.contains(step):
            return self._with_images(self.stream.padding())
        try:
            return self._with_images(self.stream.sample(index))
        except (NoDocumentsError, RemoteDataError, StreamEndError):
            raise
        except DataError as error:
            raise DataError(
                f"{str(error).rstrip('.')}. Step {step + 1} needs this document. To train without it, set "
                "data.on_bad_data = 'skip', which skips up to data.max_bad_documents that cannot be read, or add "
                f"{step} to data.skip_batches (counted from 0), which skips this batch"
            ) from error

    def _with_images(self, sample: Sample) -> Sample:
        return sample if self.images is None else self.images.complete(sample)

    def group(self, request: tuple[int, int]) -> Hashable:
        """See `SampleStream.shard_of`."""
        return self.stream.shard_of(request[1])


def _to_batches(plans: Iterator[_StepPlan], read: Iterator[Sample], pin_memory: bool) -> Iterator[Batch]:
    for plan in plans:
        samples = [next(read) for _ in plan.indices]
        micro_batches = [to_micro_batch(sample) for sample in samples]
        if pin_memory:
            micro_batches = [micro.pinned() for micro in micro_batches]
        yield Batch(
            micro_batches,
            plan.num_samples,
            list(plan.indices),
            unreadable=[message for sample in samples for message in sample.unreadable],
            num_truncated_answers=sum(sample.num_truncated_answers for sample in samples),
            cursors=[sample.cursor for sample in samples],
        )
