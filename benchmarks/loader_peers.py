"""Tokens/s of one loader worker for each kind of data, against what a user would write with peers.

    python benchmarks/loader_peers.py [--documents 20000] [--seconds 4]

The peers pack the same documents, in an order of their own, into samples of --seq-len tokens, in one worker:

- token ids: `datasets` with a column of ids, shuffled and grouped by an iterable dataset, in a DataLoader;
- Megatron datasets also: GPTDataset of megatron-core in a DataLoader;
- texts: `datasets` with a column of text, tokenized in the same place by the `tokenizers` library in batches of 100.

Rounds alternate, and the best of each is compared. What a peer prepares before (Arrow files, GPTDataset's indices) is
not counted, and neither is opening.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from torch.utils.data import DataLoader, IterableDataset

VOCAB = 4096
ROUNDS = 3


class Grouped(IterableDataset[Any]):
    """Shuffled documents, concatenated and cut every `length` tokens; positions within documents."""

    def __init__(self, dataset: Any, length: int, tokenizer: Any = None) -> None:
        self.dataset, self.length, self.tokenizer = dataset, length, tokenizer

    def documents(self) -> Iterator[Any]:
        """Token ids of each document."""
        shuffled = self.dataset.shuffle(seed=1)
        if self.tokenizer is None:
            for row in shuffled:
                yield row["input_ids"]
            return
        for batch in shuffled.iter(100):
            for encoding in self.tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False):
                yield encoding.ids

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        ids: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        filled = 0
        while True:
            for document in self.documents():
                tokens = torch.as_tensor(document)
                ids.append(tokens)
                positions.append(torch.arange(len(tokens)))
                filled += len(tokens)
                while filled > self.length:
                    all_ids, all_positions = torch.cat(ids), torch.cat(positions)
                    yield {
                        "input_ids": all_ids[: self.length],
                        "labels": all_ids[1 : self.length + 1],
                        "position_ids": all_positions[: self.length],
                    }
                    ids, positions = [all_ids[self.length :]], [all_positions[self.length :]]
                    filled -= self.length


def make_data(folder: Path, documents: int) -> Path:
    """The same documents as texts and in each format of token ids; returns the tokenizer.json."""
    import datasets
    import pyarrow
    import pyarrow.parquet
    from tokenizers import Tokenizer

    from internlm.data.megatron_files.writer import MegatronWriter
    from internlm.data.token_arrays.writer import ArrayWriter
    from internlm.data.tokenize.train_bpe import EOS_TOKEN, train_bpe
    from internlm.data.tokenized_files.writer import TokenizedWriter

    random = np.random.default_rng(0)
    words = np.array(["".join(map(chr, random.integers(97, 123, length))) for length in random.integers(2, 10, 3000)])
    texts = [" ".join(random.choice(words, size)) for size in random.integers(50, 500, documents)]
    tokenizer = folder / "tokenizer.json"
    train_bpe(texts[:500], VOCAB, tokenizer)
    encoder = Tokenizer.from_file(str(tokenizer))
    eos = encoder.token_to_id(EOS_TOKEN)
    ids = [[*encoding.ids, eos] for encoding in encoder.encode_batch_fast(texts)]
    for name in ("tokenized", "megatron", "arrays", "streaming"):
        (folder / name / "en").mkdir(parents=True)
    with (
        TokenizedWriter(folder / "tokenized" / "en" / "a.bin") as tokenized,
        MegatronWriter(folder / "megatron" / "en" / "a.bin", np.dtype(np.uint16)) as megatron,
        ArrayWriter(folder / "arrays" / "en" / "a.ds", np.dtype(np.uint16)) as arrays,
    ):
        for document in ids:
            tokenized.write(document)
            megatron.write(document)
            arrays.write(np.array(document))
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, folder / "streaming" / "en" / "a.parquet", row_group_size=1000)
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(folder / "peer_ids")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "peer_texts")
    return tokenizer


def rate(batches: Iterator[Any], tokens_per_batch: int, seconds: float) -> float:
    """Tokens/s, after the first batches, which start workers."""
    for _ in range(60):
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += 1
    return count * tokens_per_batch / (time.perf_counter() - began)


def ours(folder: Path, kind: str, tokenizer: Path, length: int, seconds: float) -> float:
    """Tokens/s of this project's loader with one worker."""
    from internlm.config.schema import Config
    from internlm.core.context.parallel_context import ParallelContext
    from internlm.initialize.build import build_layout
    from internlm.initialize.build_data import build_loader

    data = {"type": kind, "train_folder": str(folder / kind), "seq_len": length, "micro_bsz": 1, "micro_num": 1}
    data |= {"total_steps": 10**9, "num_worker": 1}
    data |= {"array_dtype": "uint16"} if kind == "arrays" else {}
    data |= {"tokenizer_path": str(tokenizer)} if kind == "streaming" else {}
    model = {"vocab_size": VOCAB, "hidden_size": 8, "num_layers": 1, "num_attention_heads": 1}
    config = Config.model_validate({"data": data, "model": model, "ckpt": {"enable_save_ckpt": False}})
    loader = build_loader(config, ParallelContext(build_layout(config, 1), 0, torch.device("cpu")))
    try:
        return rate(iter(loader), length, seconds)
    finally:
        loader.close()


def of_datasets(folder: Path, name: str, tokenizer: Path | None, length: int, seconds: float) -> float:
    """Tokens/s of `datasets` in a DataLoader."""
    import datasets
    from tokenizers import Tokenizer

    dataset = datasets.load_from_disk(folder / name)
    if name == "peer_ids":
        dataset = dataset.with_format("numpy")
    encoder = None if tokenizer is None else Tokenizer.from_file(str(tokenizer))
    loader = DataLoader(Grouped(dataset, length, encoder), batch_size=1, num_workers=1, prefetch_factor=2)
    return rate(iter(loader), length, seconds)


def of_megatron(folder: Path, length: int, seconds: float) -> float:
    """Tokens/s of GPTDataset in a DataLoader."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Ends:
        """What GPTDataset needs of a tokenizer."""

        eod, pad, vocab_size, unique_identifiers = 0, 0, VOCAB, {"class": "Ends"}

    store = f"file://{folder}/store{time.time()}"
    torch.distributed.init_process_group("gloo", init_method=store, world_size=1, rank=0)
    try:
        config = GPTDatasetConfig(
            random_seed=1,
            sequence_length=length,
            blend=([str(folder / "megatron" / "en" / "a")], None),
            split="1,0,0",
            path_to_cache=str(folder / "megatron_cache"),
            tokenizer=Ends(),
            reset_position_ids=True,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [10**6, 0, 0], lambda: True, config).build()
        loader = DataLoader(train, batch_size=1, num_workers=1, prefetch_factor=2)
        return rate(iter(loader), length, seconds)
    finally:
        torch.distributed.destroy_process_group()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        tokenizer = make_data(folder, options.documents)
        size = options.seq_len, options.seconds
        runs = {kind: lambda kind=kind: ours(folder, kind, tokenizer, *size) for kind in ("tokenized", "megatron", "arrays", "streaming")}  # fmt: skip  # noqa: E501
        runs |= {
            "datasets, ids": lambda: of_datasets(folder, "peer_ids", None, *size),
            "datasets, texts": lambda: of_datasets(folder, "peer_texts", tokenizer, *size),
        }
        runs["GPTDataset"] = lambda: of_megatron(folder, *size)
        best = dict.fromkeys(runs, 0.0)
        for _ in range(ROUNDS):
            for name, run in runs.items():
                best[name] = max(best[name], run())
    print("| data | tokens/s | against datasets | against GPTDataset |\n|---|---|---|---|")
    for name, value in best.items():
        peer = best["datasets, texts" if name in ("streaming", "datasets, texts") else "datasets, ids"]
        print(f"| {name} | {value:,.0f} | {value / peer:.2f} | {value / best['GPTDataset']:.2f} |")


if __name__ == "__main__":
    main()
