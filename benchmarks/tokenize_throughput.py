"""Throughput of our tokenization against `datasets.map` and a process pool with the same tokenizer, text and processes.

    python benchmarks/tokenize_throughput.py --processes 2

The text is Python's standard library, up to --megabytes; the tokenizer is a BPE trained on it. Both start from JSON
lines and end with token ids on the disk; starting and stopping workers is included. Rounds alternate, and the best of
each is compared. `datasets` maps a `PreTrainedTokenizerFast` over batches of 1000, its default, and its loading of the
text into Arrow is not counted. The pool is a `multiprocessing.Pool` with `imap` over the lines, in chunks of 64, whose
processes parse a line and encode its text with the `tokenizers` library, and whose parent writes the ids as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from internlm.data.tokenize.input_files import find_inputs
from internlm.data.tokenize.pipeline import TokenizeOptions, tokenize
from internlm.data.tokenize.text_inputs import TextOptions
from internlm.data.tokenize.train_bpe import EOS_TOKEN, sample_texts, train_bpe


def write_text(path: Path, max_bytes: float) -> int:
    """Write source files of the standard library as JSON lines; returns the bytes of text."""
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            if "site-packages" in source.parts or size > max_bytes:
                continue
            text = source.read_bytes().decode("utf-8", "ignore")
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
    return size


def ours(text: Path, tokenizer: Path, output: Path, processes: int) -> float:
    """Seconds of our tokenization."""
    began = time.monotonic()
    tokenize(TokenizeOptions((str(text),), output, tokenizer, processes=processes, add_eos=False))
    return time.monotonic() - began


def theirs(dataset: Any, tokenizer: Any, processes: int) -> float:
    """Seconds of `datasets.map`."""
    began = time.monotonic()
    dataset.map(
        lambda batch: {"tokens": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        num_proc=processes,
        remove_columns=["text"],
        load_from_cache_file=False,
    )
    return time.monotonic() - began


_pool_tokenizer: Any = None


def _load_in_pool(tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    global _pool_tokenizer
    _pool_tokenizer = Tokenizer.from_file(str(tokenizer))


def _encode_in_pool(line: bytes) -> bytes:
    ids = _pool_tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
    return json.dumps({"tokens": ids}).encode() + b"\n"


def pool(text: Path, tokenizer: Path, output: Path, processes: int) -> float:
    """Seconds of a process pool over lines."""
    began = time.monotonic()
    with (
        multiprocessing.Pool(processes, _load_in_pool, (tokenizer,)) as workers,
        open(text, "rb") as lines,
        open(output, "wb") as target,
    ):
        target.writelines(workers.imap(_encode_in_pool, lines, 64))
    return time.monotonic() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Compare our tokenization with datasets.map.")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        text, tokenizer = Path(folder) / "text.jsonl", Path(folder) / "tokenizer.json"
        size = write_text(text, args.megabytes * 1e6)
        train_bpe(sample_texts(find_inputs([text]).files, TextOptions(), 5_000_000), args.vocab, tokenizer)
        dataset = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=folder)
        fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), eos_token=EOS_TOKEN)
        times: dict[str, list[float]] = {"datasets.map": [], "process pool": [], "ours": []}
        for round_number in range(args.rounds):
            times["datasets.map"].append(theirs(dataset, fast, args.processes))
            pool_output = Path(folder) / "pool.jsonl"
            times["process pool"].append(pool(text, tokenizer, pool_output, args.processes))
            times["ours"].append(ours(text, tokenizer, Path(folder) / f"{round_number}.bin", args.processes))
        for name, seconds in times.items():
            print(f"{name}: {size / 1e6 / min(seconds):.2f} MB/s with {args.processes} processes")
        for name in ("datasets.map", "process pool"):
            print(f"ours / {name}: {min(times[name]) / min(times['ours']):.2f}")


if __name__ == "__main__":
    main()
