"""Create a tokenized folder with millions of documents, for timing how fast it opens (benchmarks/loader_throughput.py).

python benchmarks/make_large_corpus.py large --documents 10000000
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from internlm.data.tokenized_files.writer import TokenizedWriter, encode_line

_VOCAB_SIZE = 32000
_DISTINCT = 4096


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description="Create a tokenized folder with millions of documents.")
    parser.add_argument("out", type=Path, help="folder to create")
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--mean-tokens", type=int, default=16, help="lengths are uniform in [1, 2 * mean]")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    lines = []
    for length in random.integers(1, 2 * args.mean_tokens + 1, _DISTINCT):
        lines.append((encode_line(random.integers(0, _VOCAB_SIZE, length).tolist()), int(length)))
    began = time.monotonic()
    for number in range(args.files):
        with TokenizedWriter(args.out / "en" / f"{number:04d}.bin") as writer:
            for choice in random.integers(0, _DISTINCT, args.documents // args.files).tolist():
                writer.write_line(*lines[choice])
        print(f"{writer.path}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
