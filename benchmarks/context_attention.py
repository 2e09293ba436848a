"""Attention of one sample on context ranks of this machine, against the same attention in one process.

    python benchmarks/context_attention.py --ranks 4 --tokens 16384 --dtype bfloat16

Forward and backward of one layer, one thread a rank, in interleaved rounds. The rate is that of the visible pairs of
query and key, for each core in use: 1 means that exchange, merging and imbalance cost nothing. Also the peak memory of
a rank above that of its inputs, and the bytes that it sends.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.context.attention_executor import attend
from internlm.core.parallel.context.attention_plan import num_rows
from internlm.core.parallel.context.context_attention import context_groups
from internlm.core.parallel.context.split_batch import ContextOptions, ContextSplit
from internlm.model.ops.attention.causal_attention import VarlenMetadata, attention

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64


def documents(kind: str, num_tokens: int) -> tuple[int, ...]:
    """One document, or documents whose lengths have a heavy tail, as in pretraining data."""
    if kind == "one":
        return (num_tokens,)
    lengths: list[int] = []
    generator = np.random.default_rng(0)
    while sum(lengths) < num_tokens:
        lengths.append(min(int(256 * (1 + generator.pareto(0.8))), num_tokens - sum(lengths)))
    return tuple(lengths)


class PeakMemory:
    """The peak resident memory of this process while it is open, in bytes above that at its beginning."""

    def __enter__(self) -> PeakMemory:
        self._start = self.peak = resident_bytes()
        self._stop = Event()
        self._thread = Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, resident_bytes())

    @property
    def above_start(self) -> int:
        """Bytes."""
        return self.peak - self._start


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def release_memory() -> None:
    """Give freed memory back to the system, so that it is not used again unseen."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def inputs(num_tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and a gradient."""
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(1, num_tokens, n, HEAD_DIM).to(dtype) for n in heads]


def measure(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """Run all rounds; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.ranks)
    context = ParallelContext.create(ParallelLayout(world_size=options.ranks, context=options.ranks))
    groups = context_groups(context)
    lengths = documents(options.documents, options.tokens)
    dtype = getattr(torch, options.dtype)
    split = ContextSplit(
        rank, options.ranks, 1, {options.window: 1}, ContextOptions(options.cut, options.exchange)
    ).plan(lengths)
    plan = split.plans[options.window]
    varlen = VarlenMetadata.of(lengths)

    def whole() -> None:
        q, k, v, grad = inputs(options.tokens, dtype)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        attention(q, k, v, varlen, window=options.window).backward(grad)

    def parts() -> None:
        q, k, v, grad = inputs(plan.num_tokens, dtype)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        attend(q, k, v, plan, groups, window=options.window).backward(grad)

    memory = {}
    for name, run in (("parts", parts), ("whole", whole)):
        release_memory()
        with PeakMemory() as peak:
            if name == "parts" or rank == 0:
                run()
        memory[name] = peak.above_start
        dist.barrier()
    times: dict[str, list[float]] = {"whole": [], "parts": []}
    for number in range(options.rounds + 1):
        for name, run in (("whole", whole), ("parts", parts)):
            dist.barrier()
            started = time.perf_counter()
            if name == "parts" or rank == 0:
                run()
            dist.barrier()
            if number > 0:
                times[name].append(time.perf_counter() - started)
    if rank > 0:
        return
    cores = min(options.ranks, len(os.sched_getaffinity(0)))
    ratios = [one / (cores * many) for one, many in zip(times["whole"], times["parts"], strict=True)]
    pairs, _ = split.pieces.work(options.window)
    size = torch.promote_types(dtype, torch.float32).itemsize
    rows = {
        kind: sum(num_rows(plan.rows_of(each)) for step in plan.steps for each in getattr(step, kind))
        for kind in ("key_sends", "gradient_sends")
    }
    sent = 2 * KV_HEADS * HEAD_DIM * (2 * rows["key_sends"] * dtype.itemsize + rows["gradient_sends"] * size)
    print(
        f"{options.tokens:,} tokens in {len(lengths)} document(s), {options.dtype}, {options.ranks} ranks on {cores} "
        f"core(s), cut {split.cut.name}, balance {pairs.max() / pairs.mean():.3f}\n"
        f"one process {statistics.median(times['whole']):.3f} s, ranks {statistics.median(times['parts']):.3f} s: "
        f"rate per core {statistics.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})\n"
        f"peak memory: one process {memory['whole'] / 2**20:.0f} MiB, rank 0 {memory['parts'] / 2**20:.0f} MiB; "
        f"rank 0 sends {sent / 2**20:.1f} MiB"
    )


def main() -> None:
    """Parse options and start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="context ranks (default: 4)")
    parser.add_argument("--tokens", type=int, default=16384, help="of the sample (default: 16384)")
    parser.add_argument("--documents", choices=["one", "mixed"], default="one", help="their lengths (default: one)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--cut", default="auto", help="see parallel.context.cut")
    parser.add_argument("--exchange", default="auto", help="see parallel.context.exchange")
    parser.add_argument("--window", type=int, help="sliding window")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.ranks < 2:
        parser.error("--ranks: at least 2; the same attention in one process is measured beside them")
    with TemporaryDirectory() as folder:
        ranks = [
            get_context("fork").Process(target=measure, args=(rank, options, f"{folder}/meeting"))
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main()
