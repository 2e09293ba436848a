"""Throughput of the train loader alone, and the time that it takes to open a folder.

    python benchmarks/loader_throughput.py data/demo/train --vocab 4096

Prints, for each number of workers, the seconds to open, the seconds to the first batch, tokens per second, and the peak
private memory of this process beyond that of the imports. Private memory is resident minus shared, sampled; it excludes
pages of memory-mapped files, which the kernel reclaims when it needs memory.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.sources.open_source import open_source
from internlm.data.sources.sample_stream import ShuffledSource


class PeakMemory:
    """Samples the private memory of this process in a thread."""

    def __init__(self) -> None:
        self.base = self.peak = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def megabytes(self) -> float:
        """Growth of the peak since the start, in 10^6 bytes."""
        return (self.peak - self.base) / 1e6

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self._now())
            time.sleep(0.002)

    def _now(self) -> int:
        info = psutil.Process().memory_info()
        return info.rss - info.shared


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the train loader alone.")
    parser.add_argument("folder", help="train folder, or 'dummy'")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-bsz", type=int, default=1)
    parser.add_argument("--micro-num", type=int, default=4)
    parser.add_argument("--packing", default="cut")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    memory = PeakMemory()
    for num_workers in args.workers:
        began = time.monotonic()
        source = open_source(
            None if args.folder == "dummy" else args.folder,
            seq_len=args.seq_len,
            micro_bsz=args.micro_bsz,
            packing=args.packing,
            vocab_size=args.vocab,
            seed=0,
        )
        loader = build_train_loader(ShuffledSource(source, seed=0), micro_num=args.micro_num, num_workers=num_workers)
        opened = time.monotonic() - began
        next(loader)
        first = time.monotonic() - began - opened
        tokens, began = 0, time.monotonic()
        while time.monotonic() - began < args.seconds:
            tokens += next(loader).num_tokens
        speed = tokens / (time.monotonic() - began)
        loader.close()
        print(
            f"workers {num_workers}: open {opened:.2f} s, first batch {first:.2f} s, {speed:,.0f} tokens/s, "
            f"{loader.num_samples_per_epoch:,} samples per epoch, peak memory +{memory.megabytes:.0f} MB"
        )


if __name__ == "__main__":
    main()
