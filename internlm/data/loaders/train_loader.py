"""The train loader: an endless stream of batches whose whole state is a cursor.

Owns which samples go to which step and rank, prefetching, and the cursor. Must not know how samples are made.

Step t consumes the global sample indices [cursor, cursor + G), G = micro_num(t) * data_size; data rank r takes the
slice [cursor + r * micro_num(t), cursor + (r + 1) * micro_num(t)). Nothing here depends on data_size except through G,
nor on the number of workers. A batch may straddle two epochs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from internlm.data.batch import Batch
from internlm.data.loaders.batch_plan import NO_SKIPS, RampUp, SkipBatches, parse_skip_batches
from internlm.data.loaders.read_ahead import ReadAheadThread, WorkerProcesses
from internlm.data.loaders.sample_order import sample_order
from internlm.data.packing.collate import pin, to_micro_batch
from internlm.data.packing.sample import Sample
from internlm.data.sources.sample_source import SampleSource
from internlm.utils.errors import ConfigError, DataError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class _Request:
    """What one step asks of one rank: global sample indices [first, first + count)."""

    step: int
    first: int
    count: int
    num_samples: int


def build_train_loader(
    source: SampleSource,
    *,
    micro_num: int,
    seed: int,
    data_rank: int = 0,
    data_size: int = 1,
    num_workers: int = 0,
    rampup_batch_size: str = "",
    skip_batches: str = "",
    total_steps: int | None = None,
    pin_memory: bool = False,
    prefetch: int = 2,
) -> TrainLoader:
    """A loader over the samples of a source.

    Args:
        source: see `SampleSource`; `open_source` gives that of a train folder.
        micro_num: micro-batches of a step on each data rank, once the ramp-up is over.
        seed: of the order of samples.
        data_rank, data_size: this data rank, and how many there are.
        num_workers: processes that read ahead; 0 reads ahead in a thread of this process.
        rampup_batch_size: "start increment steps", see `RampUp`.
        skip_batches: steps (counted from 0) whose batch is not read, see `parse_skip_batches`; it is padding.
        total_steps: the loader ends before this step; None never ends.
        pin_memory: put tensors into page-locked memory (needs CUDA).
        prefetch: batches read ahead; 0, without workers, reads when asked.

    Raises:
        ConfigError: an argument is out of its range.
    """
    return TrainLoader(
        source,
        ramp_up=RampUp.parse(rampup_batch_size, micro_num),
        skipped=parse_skip_batches(skip_batches),
        seed=seed,
        data_rank=data_rank,
        data_size=data_size,
        num_workers=num_workers,
        total_steps=total_steps,
        pin_memory=pin_memory,
        prefetch=prefetch,
    )


class TrainLoader:
    """An iterator over this rank's `Batch` of each step. One consumer; not for concurrent use.

    Attributes:
        type_names: names of the types that `MicroBatch.type_ids` index.
        num_samples_per_epoch: samples of all ranks in one epoch.
        step: the next step to hand out, counted from 0.
        consumed_samples: samples of all ranks in the batches handed out so far; prefetching does not advance it.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        ramp_up: RampUp,
        skipped: SkipBatches = NO_SKIPS,
        seed: int,
        data_rank: int = 0,
        data_size: int = 1,
        num_workers: int = 0,
        total_steps: int | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        if not 0 <= data_rank < data_size:
            raise ConfigError(f"data_rank = {data_rank} is not in [0, data_size = {data_size})")
        self.type_names = source.type_names
        self.num_samples_per_epoch = len(source)
        self.step = 0
        self.consumed_samples = 0
        self._fetch = _Fetch(source, seed, skipped)
        self._num_unreadable = self._num_cut_answers = 0
        self._ramp_up = ramp_up
        self._data_rank, self._data_size = data_rank, data_size
        self._num_workers, self._prefetch = num_workers, prefetch
        self._total_steps, self._pin_memory = total_steps, pin_memory
        own_facts = {"seed": seed, "num_samples_per_epoch": len(source)}
        reserved = source.facts.keys() & {"step", "consumed_samples", *own_facts}
        if reserved:
            raise ValueError(
                f"the facts of a source may not be named {sorted(reserved)}: the loader saves these itself"
            )
        self._order_facts = {**source.facts, **own_facts}
        self._batches: Iterator[Batch] | None = None
        self._stop: Callable[[], None] | None = None

    def micro_num_at(self, step: int) -> int:
        """Micro batches of step `step` on each rank."""
        return self._ramp_up.micro_num_at(step)

    def __iter__(self) -> TrainLoader:
        """The loader itself: iterating again continues at the cursor."""
        return self

    def __next__(self) -> Batch:
        """The batch of the next step.

        Raises:
            DataError: a document of the batch is malformed.
            StopIteration: `total_steps` is reached.
        """
        if self._total_steps is not None and self.step >= self._total_steps:
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
        self._tell(batch)
        return batch

    def seek(self, step: int, consumed_samples: int) -> None:
        """Make the next batch that of `step`, starting at global sample index `consumed_samples`."""
        self.close()
        self.step, self.consumed_samples = step, consumed_samples

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and the facts that the order depends on."""
        return {"step": self.step, "consumed_samples": self.consumed_samples, **self._order_facts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the cursor of `state`; warns if the data or its packing is not what it was."""
        changed = {
            name: (state[name], value) for name, value in self._order_facts.items() if state.get(name, value) != value
        }
        if changed and self._data_rank == 0:
            logger.warning(
                "The order of samples is not that of the checkpoint (%s): training goes on at sample %d of the new "
                "order, so some documents may be seen twice and others not in this epoch",
                ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items()),
                state["consumed_samples"],
            )
        self.seek(int(state["step"]), int(state["consumed_samples"]))

    def close(self) -> None:
        """Stop reading ahead. The cursor stays; asking for a batch starts again."""
        self._batches = None
        if self._num_cut_answers > 1:
            logger.warning(
                "data rank %d: %d of the documents read have all their labels behind data.seq_len",
                self._data_rank,
                self._num_cut_answers,
            )
        self._num_cut_answers = 0
        if self._stop is not None:
            self._stop()
            self._stop = None

    def _tell(self, batch: Batch) -> None:
        """Log what the batch just handed out lacks."""
        for message in batch.unreadable:
            self._num_unreadable += 1
            logger.warning(
                "step %d: document left out, as data.skip_bad_documents says (%d on data rank %d by now): %s",
                self.step,
                self._num_unreadable,
                self._data_rank,
                message,
            )
        if batch.num_truncated_answers and not self._num_cut_answers:
            logger.warning(
                "step %d: %d document(s) have no label before data.seq_len = %s, where unpacked documents are cut "
                "off: their answers are lost (later ones are only counted). Raise data.seq_len or shorten the prompts",
                self.step,
                batch.num_truncated_answers,
                self._order_facts.get("seq_len"),
            )
        self._num_cut_answers += batch.num_truncated_answers

    def _start(self) -> Iterator[Batch]:
        requests = functools.partial(
            _requests,
            self.step,
            self.consumed_samples,
            self._ramp_up,
            self._data_rank,
            self._data_size,
            self._total_steps,
        )
        if self._num_workers > 0:
            workers = WorkerProcesses(self._fetch, requests, self._num_workers)
            thread = ReadAheadThread(_to_batches(workers, self._pin_memory), max(1, self._prefetch))
            # Finalizers also run when the loader is forgotten or the interpreter ends. The workers end first: the
            # thread may be waiting for them.
            self._stop = weakref.finalize(self, _stop_all, workers, thread)
            return thread
        batches = _to_batches(map(self._fetch, requests()), self._pin_memory)
        if self._prefetch == 0:
            return batches
        thread = ReadAheadThread(batches, self._prefetch)
        self._stop = weakref.finalize(self, _stop_all, thread)
        return thread


def _stop_all(*running: ReadAheadThread[Any] | WorkerProcesses[Any]) -> None:
    for each in running:
        each.stop()


def _requests(
    step: int, cursor: int, ramp_up: RampUp, rank: int, size: int, total_steps: int | None
) -> Iterator[_Request]:
    while total_steps is None or step < total_steps:
        count = ramp_up.micro_num_at(step)
        yield _Request(step, cursor + rank * count, count, count * size)
        cursor += count * size
        step += 1


class _Fetch:
    """Makes the samples of a request. Those of a skipped step are not read: skipping gets past what cannot be."""

    def __init__(self, source: SampleSource, seed: int, skipped: SkipBatches) -> None:
        self.source, self.seed, self.skipped = source, seed, skipped

    def __call__(self, request: _Request) -> tuple[_Request, list[Sample]]:
        if self.skipped.contains(request.step):
            return request, [self.source.padding()] * request.count
        indices = np.arange(request.first, request.first + request.count, dtype=np.int64)
        order = sample_order(indices, len(self.source), self.seed)
        try:
            return request, [self.source.sample(int(index)) for index in order]
        except DataError as error:
            raise DataError(
                f"{error}. This is for step {request.step + 1}. To train without it: data.skip_bad_documents = True "
                f"leaves out every document that cannot be read, and {request.step} in data.skip_batches (which counts "
                "from 0) passes over this batch"
            ) from error


def _to_batches(fetched: Iterator[tuple[_Request, list[Sample]]], pin_memory: bool) -> Iterator[Batch]:
    for request, samples in fetched:
        micro_batches = [to_micro_batch(sample) for sample in samples]
        if pin_memory:
            micro_batches = [pin(micro) for micro in micro_batches]
        yield Batch(
            micro_batches,
            request.num_samples,
            list(range(request.first, request.first + request.count)),
            unreadable=[message for sample in samples for message in sample.unreadable],
            num_truncated_answers=sum(sample.num_truncated_answers for sample in samples),
        )
