"""Checkpoints that a background process writes while training continues, from a copy in shared memory.

The shared memory is anonymous, so it is freed with the processes, however they end. Training waits only for the copy;
the next save waits until the previous one is written.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItemType

from internlm.checkpoint.dcp_storage import Resolver
from internlm.checkpoint.saving import RankPlan, SaveTask
from internlm.utils.errors import CheckpointError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

ALIGNMENT = 64

EXIT_SECONDS = 10.0
"""How long a process may take to end after it has closed its connection."""


@dataclass(frozen=True)
class MemoryRange:
    """The range of a tensor in the shared memory; `offset` in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Length in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """The tensor; `memory` is the whole shared memory, uint8."""
        if self.num_bytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        return memory[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class WriteRequest:
    """One save, as the background process receives it."""

    task: SaveTask
    plan: RankPlan
    ranges: list[MemoryRange]
    values: dict[str, bytes]


@dataclass(frozen=True)
class SaveOutcome:
    """The result of a `WriteRequest`.

    Attributes:
        step: step of the save.
        error: reason of the failure; None if the checkpoint is complete.
        notice: a problem that occurred after the checkpoint was complete.
        ended: end of the save by `time.monotonic`, a clock that all processes of a machine share.
    """

    step: int
    error: str | None
    notice: str | None
    ended: float


@dataclass
class SharedMemory:
    """Growing anonymous memory that a child process maps too."""

    descriptor: int = field(default_factory=lambda: _anonymous_file())
    _map: mmap.mmap | None = None
    _tensor: Tensor | None = None

    def bytes(self, size: int) -> Tensor:
        """The first `size` bytes as a uint8 tensor. Growing discards their content.

        Raises:
            CheckpointError: there is not enough memory.
        """
        if self._map is None or len(self._map) < size:
            self._tensor = self._map = None
            try:
                allocated = os.fstat(self.descriptor).st_size
                if allocated < size:
                    _check_available(size - allocated)
                    os.ftruncate(self.descriptor, size)
                self._map = mmap.mmap(self.descriptor, size)
            except OSError as error:
                raise CheckpointError(
                    f"no memory for the copy of a checkpoint ({size / 2**30:.1f} GiB on this rank): {error}; set "
                    f"ckpt.async_save = False"
                ) from error
            self._tensor = torch.frombuffer(self._map, dtype=torch.uint8)
            if torch.cuda.is_initialized():
                _pin(self._tensor)
        assert self._tensor is not None
        return self._tensor[:size]


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("internlm-checkpoint")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _check_available(size: int) -> None:
    """Raise before overcommitting: Linux grants the memory, and kills the process when it is used."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        # Not Linux.
        return
    if size > available:
        raise OSError(errno.ENOMEM, f"{available / 2**30:.1f} GiB are available on this machine")


def _pin(memory: Tensor) -> None:
    """Pin the memory, so that copies from the device run asynchronously."""
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(status) != 0:
        logger.warning("the memory for copies of checkpoints cannot be pinned (%s): copying is slower", status)


class BackgroundWriter:
    """A background process that writes checkpoints, and the memory shared with it. One save at a time."""

    def __init__(self) -> None:
        self._memory = SharedMemory()
        read_end, child_write = os.pipe()
        child_read, write_end = os.pipe()
        self._answers = Connection(read_end, writable=False)
        self._requests = Connection(write_end, readable=False)
        # The child handles host memory only; a device context would cost device memory.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "internlm.checkpoint.writer_process",
                *map(str, (child_read, child_write, self._memory.descriptor)),
            ],
            env=environment,
            pass_fds=(child_read, child_write, self._memory.descriptor),
            stdin=subprocess.DEVNULL,
        )
        os.close(child_read)
        os.close(child_write)
        self._pending: SaveTask | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save is in progress whose outcome has not been received."""
        return self._pending is not None

    def begin(self, task: SaveTask, plan: RankPlan, resolver: Resolver) -> None:
        """Copy the tensors of `plan` into shared memory and start writing them.

        Raises:
            CheckpointError: there is not enough memory, or the process has ended.
        """
        assert self._pending is None, "wait for the last save first"
        ranges, values = self._copy(plan, resolver)
        try:
            self._requests.send(WriteRequest(task, plan, ranges, values))
        except OSError as error:
            raise CheckpointError(self._exit_message()) from error
        self._pending = task

    def _copy(self, plan: RankPlan, resolver: Resolver) -> tuple[list[MemoryRange], dict[str, bytes]]:
        tensors: list[Tensor] = []
        values: dict[str, bytes] = {}
        for item in plan.plan.items:
            data: Any = resolver.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                assert isinstance(data, io.BytesIO)
                values[item.index.fqn] = data.getvalue()
            else:
                tensors.append(data.detach())
        ranges, end = _lay_out(tensors)
        memory = self._memory.bytes(max(1, end))
        for tensor, memory_range in zip(tensors, ranges, strict=True):
            memory_range.view(memory).copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()
        return ranges, values

    def poll(self) -> SaveOutcome | None:
        """The outcome of the save in progress, once it has ended; never waits."""
        return self._receive() if self.is_busy and (self._answers.poll() or self._process.poll() is not None) else None

    def wait(self, timeout: float | None = None) -> SaveOutcome | None:
        """Wait for the outcome of the save in progress; None without one, or after `timeout` seconds."""
        if not self.is_busy:
            return None
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._answers.poll(0.5):
            if self._process.poll() is not None:
                break
            if deadline is not None and time.monotonic() > deadline:
                return None
        return self._receive()

    def _receive(self) -> SaveOutcome:
        assert self._pending is not None
        step, self._pending = self._pending.step, None
        try:
            return self._answers.recv()
        except (EOFError, OSError):
            return SaveOutcome(step, self._exit_message(), None, time.monotonic())

    def _exit_message(self) -> str:
        # The connection closes shortly before the exit code is available.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_SECONDS)
        return f"the process that writes checkpoints has ended, with exit code {self._process.returncode}"

    @property
    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def close(self) -> None:
        """Wait for the save in progress and end the process."""
        self.wait()
        self._requests.close()
        self._process.wait()
        self._answers.close()
        os.close(self._memory.descriptor)


def _lay_out(tensors: Sequence[Tensor]) -> tuple[list[MemoryRange], int]:
    ranges, end = [], 0
    for tensor in tensors:
        ranges.append(MemoryRange(end, tuple(tensor.shape), tensor.dtype))
        end += -(-ranges[-1].num_bytes // ALIGNMENT) * ALIGNMENT
    return ranges, end
