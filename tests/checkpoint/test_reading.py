"""What a rank reads of a checkpoint, and what memory that takes: its share, whoever wrote it.

One process wrote it; the model is wide, so that the shares are long against the headers between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from helpers.memory import PeakMemory
from helpers.ranks import RankPool
from helpers.reads import CountReads
from helpers.resume import optimizer_of, save

from internlm.checkpoint.boxed_tensor import BoxedTensor
from internlm.checkpoint.manager import CheckpointManager
from internlm.checkpoint.reading import load_tensors
from internlm.checkpoint.run_state import model_tensors, optimizer_tensors
from internlm.utils.storage import storage_path
from internlm.verify.case import Case, Combination, changed
from internlm.verify.run import CaseRun, start_case

Ranks = Callable[[int], RankPool]

HEADERS = 2**16
"""The list of tensors, and the directory of the zip that a tensor is in."""

MESSAGES = 2**18
"""What ranks tell each other while they load a run, and are still told when the next tensor is read."""

KINDS = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
W1, W2 = "layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w2.weight"


def wide(text: str) -> Case:
    """A combination with one layer of 16 MiB a weight of its MLP."""
    case = Combination.parse(f"{text} model:layers=1").case()
    return replace(case, config=changed(case.config, {"model.hidden_size": 512, "model.intermediate_size": 8192}))


def write(case: Case, folder: str) -> None:
    run = CaseRun(case, start_case(case))
    save(CheckpointManager(folder), run.trainer)


@pytest.fixture(scope="module")
def written(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of one process."""
    folder = tmp_path_factory.mktemp("wide")
    ranks(1).run(write, wide("ranks=1"), str(folder))
    return str(folder / "0")


def load(case: Case, path: str) -> dict[str, tuple[int, int, int]]:
    """For each tensor, bytes that this rank holds of it, that it read, and that were alive at once beside it."""
    context = start_case(case)
    run = CaseRun(case, context)
    optimizer = optimizer_of(run.trainer)
    tensors: dict[str, BoxedTensor] = {**model_tensors(*optimizer.chunks), **optimizer_tensors(optimizer)}
    seen = {}
    for key, tensor in tensors.items():
        # Each rank for itself: what ranks send each other is freed by other threads, now or later.
        with CountReads() as reads, PeakMemory() as memory:
            load_tensors(storage_path(path), {key: tensor}, no_dist=True)
        held = sum(piece.numel() * piece.element_size() for _, piece in tensor.pieces)
        seen[key] = held, reads.num_bytes, memory.peak
    context.close()
    return seen


@pytest.mark.parametrize("layout", ["mode=isp,weight=4", "tensor=4,mode=mtp", "fsdp"])
def test_a_rank_reads_its_rows_of_a_weight_and_no_others(layout: str, written: str, ranks: Ranks) -> None:
    """A quarter, where rows are dealt to four ranks; and straight into their place."""
    for seen in ranks(4).run(load, wide(f"ranks=4 layout:{layout}"), written):
        for kind in KINDS:
            for name in {W1, *([] if "mtp" in layout else [W2])}:
                held, read, memory = seen[f"{kind}/{name}"]
                assert held == 2**22
                assert held <= read <= held + HEADERS
                assert memory < 2**16


def test_a_rank_reads_its_part_of_each_row_where_parts_are_long(written: str, ranks: Ranks) -> None:
    """w2 is split over columns: 8 KiB of each row of 32 KiB are this rank's."""
    for seen in ranks(4).run(load, wide("ranks=4 layout:tensor=4,mode=mtp"), written):
        for kind in KINDS:
            held, read, memory = seen[f"{kind}/{W2}"]
            assert held == 2**22
            assert held <= read <= held + HEADERS
            assert memory < 2**16


def test_whole_rows_are_read_where_parts_are_short(written: str, ranks: Ranks) -> None:
    """wo is split over columns, too: 512 bytes of each row of 2 KiB."""
    for seen in ranks(4).run(load, wide("ranks=4 layout:tensor=4,mode=mtp"), written):
        held, read, memory = seen["model/layers.0.attention.wo.weight"]
        assert held == 2**18
        assert 4 * held <= read <= 4 * held + HEADERS
        assert 4 * held <= memory < 4 * held + 2**16


def load_all(case: Case, path: str) -> tuple[int, int]:
    """Bytes that were alive at once while a whole run was loaded, and those that it holds on this rank."""
    context = start_case(case)
    run = CaseRun(case, context)
    optimizer = optimizer_of(run.trainer)
    tensors: dict[str, BoxedTensor] = {**model_tensors(*optimizer.chunks), **optimizer_tensors(optimizer)}
    held = sum(piece.numel() * piece.element_size() for tensor in tensors.values() for _, piece in tensor.pieces)
    with PeakMemory() as memory:
        CheckpointManager(None).load(run.trainer, path)
    context.close()
    return memory.peak, held


@pytest.mark.parametrize("layout", ["mode=isp,weight=4", "tensor=4,mode=mtp", "fsdp"])
def test_loading_takes_memory_for_one_tensor_at_a_time(layout: str, written: str, ranks: Ranks) -> None:
    """The rows of wo, 1 MiB, at most: a thirtieth of what a rank holds."""
    for peak, held in ranks(4).run(load_all, wide(f"ranks=4 layout:{layout}"), written):
        assert held > 30 * 2**20
        assert peak < 2**20 + MESSAGES
