"""Prefetches the items of an iterator, in a thread or in worker processes.

Owns the threads and processes, their shutdown and their errors; must not know data. The order of items does not depend
on the number of workers: the parent and each worker compute which worker makes which item.
"""

from __future__ import annotations

import itertools
import multiprocessing
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from internlm.utils.errors import UserError

T = TypeVar("T")
_POLL_SECONDS = 0.05
_END = "end"
_ITEM = "item"
_USER_ERROR = "user error"
_CRASH = "crash"


class ReadAheadThread(Generic[T]):
    """An iterator that a thread prefetches by at most `depth` items; its exceptions reach the consumer in order."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="data-read-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(True, item):
                    return
            self._put(False, StopIteration())
        except BaseException as error:  # raised in the consumer
            self._put(False, error)

    def _put(self, is_item: bool, value: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put((is_item, value), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        is_item, value = self._queue.get()
        if not is_item:
            raise value
        return value

    def stop(self) -> None:
        """Stop the thread, after the item that it is making."""
        self._stopped.set()
        self._thread.join()


class WorkerProcesses(Generic[T]):
    """An iterator over `make(argument)` for each of `arguments`, made by `num_workers` processes.

    A worker prefetches as many items as its pipe takes, and at least one. Workers are forked where the system supports
    it: they use neither torch nor the device, so threads of the parent (OpenMP, CUDA) do not matter.

    Args:
        make: makes an item from an argument, in a worker.
        arguments: called in every worker and in this process; must return the same items each time.
        num_workers: number of processes.
        group: of an argument. Items of a group are made by one worker; the next new group goes to the next worker. None
            as a group: the item goes to the next worker.
    """

    def __init__(
        self,
        make: Callable[[Any], T],
        arguments: Callable[[], Iterable[Any]],
        num_workers: int,
        group: Callable[[Any], Hashable] = lambda argument: None,
    ) -> None:
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("fork" if "fork" in methods else None)
        self._readers: list[Connection] = []
        self._processes: list[Any] = []
        for worker in range(num_workers):
            reader, writer = context.Pipe(duplex=False)
            self._readers.append(reader)
            # A worker closes the readers that it inherits: writing then fails once the parent has exited.
            inherited = self._readers if context.get_start_method() == "fork" else []
            process = context.Process(
                target=_run_worker, args=(make, arguments, worker, num_workers, group, writer, inherited), daemon=True
            )
            process.start()
            writer.close()
            self._processes.append(process)
        self._dealt = _deal(arguments(), num_workers, group)
        # At exit, Python sends SIGTERM to child processes and joins them. These ignore SIGTERM, so kill them before.
        self._finalize = util.Finalize(None, _kill, args=(self._processes,), exitpriority=1)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        # After the last item, each worker reports the end.
        worker, _ = next(self._dealt, (0, None))
        try:
            kind, value = self._readers[worker].recv()
        except (EOFError, OSError):
            process = self._processes[worker]
            process.join(timeout=1)
            raise RuntimeError(
                f"data worker {worker} (pid {process.pid}) exited unexpectedly, exit code {process.exitcode} "
                "(-9: killed, often because memory ran out; lower data.num_worker)"
            ) from None
        if kind == _ITEM:
            return value
        if kind == _USER_ERROR:
            raise value
        if kind == _CRASH:
            raise RuntimeError(f"data worker {worker} failed:\n{value}")
        raise StopIteration

    def stop(self) -> None:
        """Kill the processes; a consumer that waits in another thread gets an error."""
        self._finalize()


def _deal(arguments: Iterable[Any], num_workers: int, group: Callable[[Any], Hashable]) -> Iterator[tuple[int, Any]]:
    """(worker, argument) of each item."""
    workers = itertools.cycle(range(num_workers))
    owners: dict[Hashable, int] = {}
    for argument in arguments:
        key = group(argument)
        if key is None:
            yield next(workers), argument
            continue
        if key not in owners:
            owners[key] = next(workers)
        yield owners[key], argument


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _run_worker(
    make: Callable[[Any], Any],
    arguments: Callable[[], Iterable[Any]],
    worker: int,
    num_workers: int,
    group: Callable[[Any], Hashable],
    writer: Connection,
    inherited: list[Connection],
) -> None:
    # Terminals and batch systems signal all processes of a run, but the trainer needs data until it has stopped. The
    # parent stops its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for reader in inherited:
        reader.close()
    try:
        for owner, argument in _deal(arguments(), num_workers, group):
            if owner == worker:
                writer.send((_ITEM, make(argument)))
        writer.send((_END, None))
    except BrokenPipeError:
        return  # the parent has exited
    except UserError as error:
        writer.send((_USER_ERROR, error))
    except Exception:
        writer.send((_CRASH, traceback.format_exc()))
