"""Rows/s of reading texts by number, against the random access of Hugging Face `datasets` to the same rows.

    python benchmarks/row_reading.py [--rows 50000] [--folder FOLDER]

Orders: the file's; shuffled over the file; and shuffled in blocks, where the blocks of a parquet file are in shuffled
order and so are the rows in each. Of a parquet file, 8 MB of decoded blocks are kept, as of a file of gigabytes by
default. `datasets` first converts every format into Arrow files in its cache, which is not counted; neither is the
index of JSON lines, whose time is printed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SECONDS = 3.0
GROUP_ROWS = 1000
KEPT_BYTES = 8 * 2**20


def make_files(folder: Path, num_rows: int) -> list[Path]:
    """The same rows in each format: an id, a text of 100 to 3,000 characters, and metadata."""
    import pyarrow
    import pyarrow.parquet

    random = np.random.default_rng(0)
    words = np.array(["".join(map(chr, random.integers(97, 123, length))) for length in random.integers(2, 10, 5000)])
    rows = [
        {"id": number, "text": " ".join(random.choice(words, size)), "meta": {"source": "web", "score": 0.5}}
        for number, size in enumerate(random.integers(15, 450, num_rows))
    ]
    table = pyarrow.Table.from_pylist(rows)
    paths = [folder / f"rows{suffix}" for suffix in (".parquet", ".arrow", ".jsonl", ".jsonl.gz")]
    pyarrow.parquet.write_table(table, paths[0], row_group_size=GROUP_ROWS)
    with pyarrow.ipc.new_stream(paths[1], table.schema) as writer:
        writer.write_table(table, max_chunksize=GROUP_ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    paths[2].write_bytes(lines)
    paths[3].write_bytes(gzip.compress(lines, 1))
    return paths


def rate(read: Callable[[int], object], order: Iterable[int]) -> float:
    """Rows/s, over all rows of `order` or SECONDS."""
    start = time.perf_counter()
    count = 0
    for row in order:
        read(row)
        count += 1
        if count % 256 == 0 and time.perf_counter() - start > SECONDS:
            break
    return count / (time.perf_counter() - start)


def orders(num_rows: int) -> dict[str, list[int]]:
    """The orders to read in, as row numbers."""
    random = np.random.default_rng(1)
    starts = range(0, num_rows, GROUP_ROWS)
    blocks = [random.permutation(np.arange(start, min(start + GROUP_ROWS, num_rows))) for start in starts]
    return {
        "in order": list(range(num_rows)),
        "shuffled in blocks": np.concatenate([blocks[block] for block in random.permutation(len(blocks))]).tolist(),
        "shuffled": random.permutation(num_rows).tolist(),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, help="where to write the files; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
        measure(Path(folder), options.rows)


def measure(folder: Path, num_rows: int) -> None:
    """Measure every format and order."""
    import datasets

    from internlm.data.rows import process_cache
    from internlm.data.rows.open_rows import open_rows
    from internlm.data.rows.row_file import read_text

    process_cache.BLOCKS.limit = KEPT_BYTES
    print("| file | order | rows/s | datasets, rows/s | ratio |\n|---|---|---|---|---|")
    for path in make_files(folder, num_rows):
        kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix, "json")
        loaded = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(folder / "hf"))
        peer = loaded.select_columns(["text"])
        start = time.perf_counter()
        file = open_rows(path, ["text"])
        assert len(file) == len(peer) == num_rows
        opening = time.perf_counter() - start
        for name, order in orders(num_rows).items():
            assert all(read_text(file, row, "text") == peer[row]["text"] for row in order[:100])
            ours = rate(partial(read_text, file, column="text"), order)
            theirs = rate(lambda row, peer=peer: peer[row]["text"], order)  # type: ignore[misc]
            print(f"| {path.name} | {name} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |", flush=True)
        print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB, opened in {opening:.2f} s")


if __name__ == "__main__":
    main()
