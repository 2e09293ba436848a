"""One save, from the plan to the manifest.

    plan (all ranks, once a run) -> every rank writes its part -> the main rank completes the checkpoint

A rank writes its tensors in place or, in the background, a copy of them: its `Resolver` decides.
"""

from __future__ import annotations

import copy
import io
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from internlm.checkpoint import save_folder
from internlm.checkpoint.boxed_tensor import BoxSavePlanner
from internlm.checkpoint.dcp_storage import METADATA_FILE, ChecksumFile, FileChecksum, Resolver, write_tensors
from internlm.checkpoint.manifest import WHOLE_RUN, Manifest
from internlm.core.communication.objects import from_main_rank
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.failure import describe_error
from internlm.utils.errors import CheckpointError, UserError
from internlm.utils.storage import StoragePath, storage_failure

PARTS = ".parts"
"""Folder in which ranks that write in the background report their parts."""

PARTS_TIMEOUT = 1800.0
"""Seconds that the main rank waits for the other parts after it has written its own."""

ORPHAN_TIMEOUT = 60.0
"""Likewise after the run has ended, when other ranks may be gone."""


@dataclass(frozen=True)
class RankPlan:
    """What one rank writes of a checkpoint.

    Attributes:
        plan: the boxes; exactly one rank writes a box that several hold.
        metadata: metadata of all ranks' boxes; on the main rank only.
    """

    plan: SavePlan
    metadata: Metadata | None


@dataclass(frozen=True)
class SaveTask:
    """One rank's task in a save. Picklable.

    Attributes:
        step: step of the run.
        final: folder of the complete checkpoint.
        writing: folder to write into.
        is_snapshot: whether `final` is one of the two alternating folders of snapshots.
        rank: this rank.
        world_size: number of ranks that write.
        contents: parts of a run that the checkpoint contains.
        files: name -> content of small files, written by the main rank.
        save_folder: folder whose checkpoints `keep_latest` limits.
        keep_latest: number of complete checkpoints up to this step to keep; None keeps all.
        after_save: called by the main rank with `final`, once the checkpoint is complete.
    """

    step: int
    final: StoragePath
    writing: StoragePath
    is_snapshot: bool = False
    rank: int = 0
    world_size: int = 1
    contents: tuple[str, ...] = WHOLE_RUN
    files: dict[str, bytes] | None = None
    save_folder: StoragePath | None = None
    keep_latest: int | None = None
    after_save: Callable[[StoragePath], None] | None = None


@dataclass(frozen=True)
class WrittenPart:
    """What a rank has written: the library's write results and checksums by file name; or the reason of a failure."""

    rank: int
    results: list[WriteResult]
    checksums: dict[str, FileChecksum]
    error: str | None = None


def make_plan(tensors: dict[str, Any], rank: int = 0, world_size: int = 1) -> RankPlan:
    """Decide which rank writes which box; collective. The plan is valid for every save of the same boxes.

    Raises:
        CheckpointError: the boxes of all ranks do not cover every tensor.
    """
    planner = BoxSavePlanner()
    planner.set_up_planner(tensors, is_coordinator=rank == 0)
    local = planner.create_local_plan()
    if world_size == 1:
        plans, metadata_of_all = _global_plan(planner, [local])
        return RankPlan(plans[0], metadata_of_all)
    gathered: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(local, gathered)
    answers: list[Any] | None = None
    metadata: Metadata | None = None
    if gathered is not None:
        try:
            answers, metadata = _global_plan(planner, gathered)
        except CheckpointError as error:
            answers = [str(error)] * world_size
    answer: list[Any] = [None]
    dist.scatter_object_list(answer, answers)
    if isinstance(answer[0], str):
        raise CheckpointError(answer[0])
    return RankPlan(answer[0], metadata)


def _global_plan(planner: BoxSavePlanner, local: list[SavePlan]) -> tuple[list[Any], Metadata]:
    try:
        plans, metadata = planner.create_global_plan(local)
    except ValueError as error:
        raise CheckpointError(f"the boxes of all ranks do not cover every tensor exactly: {error}") from error
    return plans, metadata


class Copies:
    """The `Resolver` of a copy of a rank's tensors.

    Args:
        plan: the plan that the copy was made for.
        tensors: the tensors of the plan, in its order.
        values: name -> bytes of the items that are not tensors.
    """

    def __init__(self, plan: SavePlan, tensors: Sequence[Tensor], values: dict[str, bytes]) -> None:
        items = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        self._tensors = {item.index: tensor for item, tensor in zip(items, tensors, strict=True)}
        self._values = values

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor or the bytes of an item of the plan."""
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._values[write_item.index.fqn])
        return self._tensors[write_item.index]


def write_part(task: SaveTask, plan: RankPlan, resolver: Resolver) -> WrittenPart:
    """Write this rank's part; a failure is returned as `WrittenPart.error`."""
    # The name that torch.distributed.checkpoint would give it.
    path = task.writing / f"__{task.rank}_0.distcp"
    try:
        results, total = write_tensors(path, plan.plan, resolver)
        return WrittenPart(task.rank, results, {path.name: total})
    except Exception as error:
        who = f"rank {task.rank}: " if task.world_size > 1 else ""
        return WrittenPart(task.rank, [], {}, f"{who}{describe_failure(error)}")


def complete(task: SaveTask, metadata: Metadata, parts: Sequence[WrittenPart]) -> None:
    """Complete the checkpoint once all parts are written; on the main rank. A failure removes what was written.

    Raises:
        CheckpointError: a rank failed to write its part, or the final folder exists and no save wrote it.
        StorageError: the storage cannot be written.
    """
    try:
        failed = [part for part in parts if part.error is not None]
        if failed:
            others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise CheckpointError(f"{failed[0].error}{others}")
        checksums = {name: total for part in parts for name, total in part.checksums.items()}
        checksums[METADATA_FILE] = _write_metadata(task.writing, metadata, parts)
        for name, content in (task.files or {}).items():
            checksums[name] = _write_file(task.writing, name, content)
        (task.writing / PARTS).remove()
        manifest = Manifest(task.step, task.contents, checksums)
        save_folder.finish_writing(task.writing, task.final, manifest, is_snapshot=task.is_snapshot)
    except BaseException:
        discard(task)
        raise


def save_together(
    task: SaveTask, plan: RankPlan, resolver: Resolver, context: ParallelContext
) -> tuple[str | None, str | None]:
    """Write all parts and complete the checkpoint; collective.

    Returns:
        (error of a failed save, notice of a complete one); the same on all ranks.
    """
    part = write_part(task, plan, resolver)
    parts: list[Any] | None = [part]
    if context.world_group is not None:
        parts = [None] * context.world_size if context.is_main_rank else None
        dist.gather_object(part, parts)

    def finish() -> tuple[str | None, str | None]:
        assert parts is not None and plan.metadata is not None
        try:
            complete(task, plan.metadata, parts)
        except (CheckpointError, OSError) as error:
            return str(error), None
        return None, follow_up(task)

    return from_main_rank(context, finish)


def _write_metadata(folder: StoragePath, metadata: Metadata, parts: Sequence[WrittenPart]) -> FileChecksum:
    # The library writes it under another name and renames it, which object stores cannot.
    metadata = copy.copy(metadata)
    metadata.storage_data = {result.index: result.storage_data for part in parts for result in part.results}
    metadata.storage_meta = None
    return _write_file(folder, METADATA_FILE, pickle.dumps(metadata))


def _write_file(folder: StoragePath, name: str, content: bytes) -> FileChecksum:
    path = folder
    *parents, last = name.split("/")
    for parent in parents:
        path = path / parent
        path.make_folder()
    with (path / last).open_write() as file:
        hashed = ChecksumFile(file)
        hashed.write(content)
    return hashed.checksum


def follow_up(task: SaveTask) -> str | None:
    """Remove old checkpoints and call `after_save`; returns their errors, which leave the checkpoint complete."""
    notices = []
    try:
        _remove_old(task)
    except OSError as error:
        notices.append(f"older checkpoints could not be removed: {error}")
    if task.after_save is not None:
        try:
            task.after_save(task.final)
        except Exception as error:
            notices.append(f"{getattr(task.after_save, '__name__', 'after_save')} failed: {describe_error(error)}")
    return "; ".join(notices) or None


def discard(task: SaveTask) -> None:
    """Remove what a failed save has written, if the storage permits."""
    try:
        task.writing.remove()
    except OSError:
        # The storage made the save fail; the next save removes the leftovers.
        return


def _remove_old(task: SaveTask) -> None:
    if task.keep_latest is None or task.save_folder is None:
        return
    kept = [
        found
        for found in save_folder.find_checkpoints(task.save_folder)
        # Later steps belong to another run or were refused as damaged; counting them would remove this run's newest.
        if found.step <= task.step
        and not found.is_snapshot
        and save_folder.why_not_replaceable(found.path, found.step) is None
    ]
    for found in kept[: -task.keep_latest]:
        save_folder.remove_checkpoint(found.path)


# -- reporting parts without a process group ---------------------------------------------------------------------------


def announce_part(task: SaveTask, part: WrittenPart) -> None:
    """Report a part to the main rank: a file in the folder of the save."""
    content = pickle.dumps(part)
    folder = task.writing / PARTS
    folder.make_folder()
    if not folder.is_local:
        (folder / f"{part.rank}").write_bytes(content)
        return
    (folder / f".{part.rank}").write_bytes(content)
    (folder / f".{part.rank}").rename_to(folder / f"{part.rank}")


def collect_parts(
    task: SaveTask, own: WrittenPart, timeout: float = PARTS_TIMEOUT, run_has_ended: Callable[[], bool] = lambda: False
) -> list[WrittenPart]:
    """Wait until all ranks have reported their parts, or one has failed.

    Args:
        task: the save.
        own: the part of this rank.
        timeout: seconds to wait; at most `ORPHAN_TIMEOUT` once the run has ended.
        run_has_ended: whether the run has ended.

    Returns:
        The parts by rank.

    Raises:
        CheckpointError: a rank did not report in time.
    """
    parts = {own.rank: own}
    folder = task.writing / PARTS
    deadline, pause = time.monotonic() + timeout, 0.05
    while len(parts) < task.world_size and all(part.error is None for part in parts.values()):
        for name in folder.names():
            if name.isdigit() and int(name) not in parts:
                parts[int(name)] = pickle.loads((folder / name).read_bytes())
        if len(parts) < task.world_size:
            if run_has_ended():
                deadline = min(deadline, time.monotonic() + ORPHAN_TIMEOUT)
            if time.monotonic() > deadline:
                missing = sorted(set(range(task.world_size)) - set(parts))
                raise CheckpointError(f"ranks {missing[:10]} did not write their parts in time")
            time.sleep(pause)
            pause = min(2.0, pause * 1.5)
    return [parts[rank] for rank in sorted(parts)]


def describe_failure(error: Exception) -> str:
    """Why a save failed: one line for a user error or a storage failure, a traceback for a defect."""
    failure = storage_failure(error)
    if failure is not None:
        return str(failure)
    if isinstance(error, OSError | UserError):
        return str(error)
    return f"{describe_error(error)}\n{''.join(traceback.format_exception(error))}"
