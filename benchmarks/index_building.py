"""Time and memory of opening a train folder whose index is not cached, by one process and by several at once.

    python benchmarks/make_large_corpus.py large --documents 10000000
    python benchmarks/index_building.py large --processes 1 8

Each process stands for a rank of a node: one builds the index, the others wait for it. Deletes the index cache of the
folder before each measurement. Prints the seconds until all have read a first sample, CPU seconds of all, and the
largest growth of the private memory of a process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import sys
import time
from multiprocessing.queues import SimpleQueue
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from loader_throughput import PeakMemory

from internlm.data.documents.index_cache import CACHE_FOLDER
from internlm.data.sources.open_source import open_source


def _open(args: argparse.Namespace, packing: str, results: SimpleQueue[float]) -> None:
    memory = PeakMemory()
    source = open_source(
        args.folder, seq_len=args.seq_len, micro_bsz=args.micro_bsz, packing=packing, vocab_size=args.vocab
    )
    source.sample(len(source) // 2)
    results.put(memory.megabytes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure how fast the index of a train folder is built.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-bsz", type=int, default=1)
    parser.add_argument("--packing", nargs="+", default=["cut", "unpacked", "best_fit"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    context = multiprocessing.get_context("fork")
    for packing in args.packing:
        for count in args.processes:
            for cache in args.folder.rglob(CACHE_FOLDER):
                shutil.rmtree(cache)
            results = context.SimpleQueue()
            processes = [context.Process(target=_open, args=(args, packing, results)) for _ in range(count)]
            began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
            if any(process.exitcode for process in processes):
                sys.exit(f"{packing}: a process failed")
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            peak = max(results.get() for _ in processes)
            print(f"{packing}, {count} processes: {seconds:.2f} s, {cpu:.2f} CPU s, private memory +{peak:.0f} MB")


if __name__ == "__main__":
    main()
