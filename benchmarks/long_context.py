"""Extends the context of a small pretrained model, 256 -> 2048, with each kind of rope scaling.

    python benchmarks/long_context.py --work trial

A document is a random text of 8 to 1536 tokens that repeats until its end, so whoever attends far enough back can copy
all but the first period. Trains a model on documents of 256 tokens, exports it to Hugging Face's format and imports it
again, then starts one run from it for each way to extend, on documents of 2048 tokens. Prints and plots the loss by
position before and after this fine-tuning, and compares an export with transformers. A second call continues an
interrupted first one.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm.core.position_buckets import bucket_of, name_of
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.writer import TokenizedWriter

ROOT = Path(__file__).resolve().parent.parent

VOCAB = 256
SHORT, LONG = 256, 2048
FACTOR = LONG // SHORT
HEAD_DIM = 32

MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "embedding_init_std": 0.5,
    "attn_wqkv_init_std": 0.12,
    "attn_other_init_std": 0.12,
    "ffn_uplayer_init_std": 0.12,
    "ffn_other_init_std": 0.1,
    "out_head_init_std": 0.05,
    "dtype": "torch.float32",
}


def scaling(kind: str) -> dict[str, object]:
    """The keys of a model that a kind of `rope_scaling` extends."""
    values = {"type": kind, "factor": float(FACTOR), "original_max_position_embeddings": SHORT}
    return {"rope_scaling": values, "max_position_embeddings": LONG}


EXTENSIONS: dict[str, dict[str, object]] = {
    "none": {"max_position_embeddings": LONG},
    "linear": scaling("linear"),
    "NTK": {"rope_base": 10000.0 * FACTOR ** (HEAD_DIM / (HEAD_DIM - 2)), "max_position_embeddings": LONG},
    "llama3": scaling("llama3"),
    "yarn": scaling("yarn"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for all output")
    parser.add_argument("--steps", type=int, default=2000, help="steps at the short length (default: 2000)")
    parser.add_argument("--long-steps", type=int, default=40, help="steps at the long length (default: 40)")
    parser.add_argument("--plot", type=Path, help="file of the plot (default: loss_by_position.svg in --work)")
    options = parser.parse_args()
    work = options.work
    if not (work / "long" / "valid").exists():
        write_corpus(work)
    train(work, "base", SHORT, options.steps, {"max_position_embeddings": SHORT})
    hf, imported = work / "hf", work / "imported"
    if not imported.exists():
        internlm("convert", "to-hf", "--ckpt", work / "base" / "checkpoints", "--out", hf)
        internlm("convert", "from-hf", "--hf", hf, "--out", imported)
    for name, keys in EXTENSIONS.items():
        train(work, name, LONG, options.long_steps, keys, start=imported)
    best_possible(work)
    runs = [f"{name}={work / name / 'run'}" for name in EXTENSIONS] + [f"best possible={work / 'best'}"]
    plot = options.plot or work / "loss_by_position.svg"
    titles = ["before fine-tuning", f"after {options.long_steps} steps at {LONG} tokens"]
    tool = [sys.executable, ROOT / "tools" / "loss_by_position.py", *runs, "--plot", plot, "--titles", *titles]
    subprocess.run(list(map(str, tool)), check=True)
    compare_export(work, "yarn")


def write_corpus(work: Path) -> None:
    """Tokenized files of documents of one length; each repeats a period of log-uniform length."""
    for seed, (split, count, length) in enumerate(
        [("train", 40000, SHORT), ("valid", 128, SHORT), ("train", 1200, LONG), ("valid", 32, LONG)]
    ):
        generator = np.random.default_rng(seed)
        longest = length * 3 // 4
        path = work / ("short" if length == SHORT else "long") / split / "copies" / "copies.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        with TokenizedWriter(path) as writer:
            for _ in range(count):
                period = round(math.exp(generator.uniform(math.log(8), math.log(longest))))
                writer.write(np.resize(generator.integers(0, VOCAB, period), length).tolist())


def train(work: Path, name: str, seq_len: int, steps: int, keys: dict[str, object], start: Path | None = None) -> None:
    """Train with the model keys `keys`, from the checkpoint `start` if there is one; evaluated at both ends."""
    folder = work / name
    data = work / ("short" if seq_len == SHORT else "long")
    ckpt: dict[str, object] = {"save_ckpt_folder": str(folder / "checkpoints"), "checkpoint_every": min(steps, 500)}
    if start is not None:
        ckpt["load_ckpt_info"] = {"path": str(start), "content": ("model",)}
        ckpt["allow_model_changes"] = tuple(f"model.{key}" for key in keys if key.startswith("rope"))
    model = MODEL
    if start is not None:
        model = {key: value for key, value in MODEL.items() if not key.endswith("_init_std")}
    sections = {
        "model_type": "LLAMA2",
        "data": {
            "train_folder": str(data / "train"),
            "valid_folder": str(data / "valid"),
            "seq_len": seq_len,
            "micro_bsz": 24 * SHORT // seq_len,
            "micro_num": 1,
            "total_steps": steps,
            "valid_every": steps,
            "valid_at_start": True,
            "valid_by_position": True,
            "num_worker": 0,
        },
        "model": {**model, **keys},
        "adam": {"lr": 4e-3 if start is None else 1e-3, "adam_beta2": 0.98, "weight_decay": 0.1},
        "lr_scheduler": {"warmup_ratio": 0.05, "eta_min": 3e-4},
        "hybrid_zero_optimizer": {"clip_grad_norm": 1.0},
        "ckpt": ckpt,
        "monitor": {"log_every": 50},
        "enable_tb": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.py"
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in sections.items()))
    internlm("train", "--config", config, "--run-dir", folder / "run")


def best_possible(work: Path) -> None:
    """Write a metrics.jsonl with the loss of a reader that knows nothing of a period and copies all after it."""
    file = TokenizedFile(work / "long" / "valid" / "copies" / "copies.bin", vocab_size=VOCAB)
    losses = np.zeros(LONG - 1)
    for number in range(len(file)):
        ids, _ = file.read(number)
        period = next(p for p in range(1, LONG) if np.array_equal(ids[p:], ids[:-p]))
        losses[: period - 1] += math.log(VOCAB) / len(file)
    buckets = bucket_of(torch.arange(LONG - 1)).numpy()
    line = {
        f"val/copies_loss_by_position/{name_of(b)}": float(losses[buckets == b].mean()) for b in set(buckets.tolist())
    }
    (work / "best").mkdir(exist_ok=True)
    (work / "best" / "metrics.jsonl").write_text(json.dumps({"step": 0, **line}) + "\n")


@torch.no_grad()
def compare_export(work: Path, name: str) -> None:
    """Print the loss of a run's last evaluation and that of transformers on its export."""
    out = work / name / "hf"
    if not out.exists():
        internlm("convert", "to-hf", "--ckpt", work / name / "checkpoints", "--out", out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    file = TokenizedFile(work / "long" / "valid" / "copies" / "copies.bin", vocab_size=VOCAB)
    rows = [torch.tensor(file.read(number)[0].astype(np.int64))[None] for number in range(len(file))]
    loss = sum(float(model(row, labels=row).loss) for row in rows) / len(rows)
    lines = map(json.loads, (work / name / "run" / "metrics.jsonl").read_text().splitlines())
    ours = [line["val/copies_loss"] for line in lines if "val/copies_loss" in line][-1]
    print(f"loss of '{name}' at {LONG} tokens: {ours:.5f}, of transformers on its export: {loss:.5f}")


def internlm(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "internlm.cli", *map(str, words)], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
