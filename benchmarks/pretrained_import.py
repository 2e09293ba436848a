"""Imports a pretrained model, compares its loss with transformers, continues its training, and exports it again.

    python benchmarks/pretrained_import.py --hf SmolLM2-135M-Instruct --work trial --steps 30

`--gguf FILE` first creates the Hugging Face folder from a .gguf file (needs the package gguf). The text is Python's
reference manual, as shipped with `pydoc`; every tenth page is held out. Prints the losses of transformers and of this
package on the held-out pages, whether the export is bit-equal, and the loss of the trained model, measured by
transformers on its export.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm.checkpoint.load_model import load_model_for_inference

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder; created first with --gguf")
    parser.add_argument("--gguf", type=Path, help="create the folder from this file")
    parser.add_argument("--work", type=Path, required=True, help="new folder for all output")
    parser.add_argument("--steps", type=int, default=30, help="training steps (default: 30)")
    parser.add_argument("--rows", type=int, default=24, help="held-out rows of 512 tokens (default: 24)")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    if options.gguf is not None:
        from_gguf(options.gguf, options.hf)
    train_text, rows = make_data(options.hf, options.work, options.rows)

    ours = options.work / "ours"
    report("from-hf, s", run("convert", "from-hf", "--hf", options.hf, "--out", ours))
    theirs_loss, theirs = transformers_loss(options.hf, rows)
    ours_loss, logits = our_loss(ours, rows)
    report("loss, transformers", theirs_loss)
    report("loss, this package", ours_loss)
    report("perplexity", math.exp(ours_loss))
    report("largest difference of a logit", float((logits - theirs).abs().max()))
    report("largest logit", float(theirs.abs().max()))
    report("same next token, share", float((logits.argmax(-1) == theirs.argmax(-1)).float().mean()))

    back = options.work / "back"
    report("to-hf, s", run("convert", "to-hf", "--ckpt", ours, "--out", back))
    report("tensors equal bit for bit", equal_tensors(options.hf, back))

    config = write_config(options, train_text)
    report("training, s", run("train", "--config", config, "--run-dir", options.work / "run"))
    lines = [json.loads(line) for line in (options.work / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    report("training loss, first five steps", [round(loss, 3) for loss in losses[:5]])
    report("training loss, last five steps", [round(loss, 3) for loss in losses[-5:]])
    trained = options.work / "trained"
    run("convert", "to-hf", "--ckpt", options.work / "checkpoints", "--out", trained)
    report("held-out loss after training, transformers on the export", transformers_loss(trained, rows)[0])


def from_gguf(file: Path, folder: Path) -> None:
    """Convert a .gguf file to a Hugging Face folder in fp32, with transformers."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The weights are dequantized, but transformers refuses to save a model with a quantization config.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def make_data(hf: Path, work: Path, num_rows: int) -> tuple[Path, Tensor]:
    """Folder of tokenized pages for training, and held-out rows int64 `[R, 512]`."""
    pages = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    text = work / "manual.jsonl"
    train_pages = [page for number, page in enumerate(pages) if number % 10]
    text.write_text("".join(json.dumps({"text": page}) + "\n" for page in train_pages))
    target = work / "train" / "en" / "manual.bin"
    tokenizer = [sys.executable, ROOT / "tools" / "tokenizer.py", text, "--tokenizer", hf, "--output", target]
    subprocess.run([str(word) for word in tokenizer], check=True)
    held_out = AutoTokenizer.from_pretrained(hf)("\n\n".join(pages[::10]))["input_ids"]
    rows = torch.tensor(held_out[: len(held_out) // 512 * 512]).view(-1, 512)[:num_rows]
    return work / "train", rows


def run(*words: object) -> float:
    """Run `internlm` with these arguments; returns seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "internlm.cli", *map(str, words)], check=True, cwd=ROOT)
    return time.perf_counter() - start


def loss_of(logits: Tensor, rows: Tensor) -> float:
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))


@torch.no_grad()
def transformers_loss(folder: Path, rows: Tensor) -> tuple[float, Tensor]:
    """Mean loss of the rows, and the logits of the first one, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = [loss_of(model(row[None]).logits, row[None]) for row in rows]
    return sum(losses) / len(losses), model(rows[:1]).logits


@torch.no_grad()
def our_loss(folder: Path, rows: Tensor) -> tuple[float, Tensor]:
    """The same for a native checkpoint."""
    model: Any = load_model_for_inference(folder)[0]
    positions = torch.arange(rows.shape[1])[None]
    losses = [loss_of(model.logits(model(row[None], positions)), row[None]) for row in rows]
    return sum(losses) / len(losses), model.logits(model(rows[:1], positions))


def equal_tensors(before: Path, after: Path) -> bool:
    """Whether two folders contain the same names with bit-equal tensors."""
    first, second = ({n: t for f in d.glob("*.safetensors") for n, t in load_file(f).items()} for d in (before, after))
    same_names = first.keys() == second.keys()
    return same_names and all(t.dtype == second[n].dtype and torch.equal(t, second[n]) for n, t in first.items())


def write_config(options: argparse.Namespace, train: Path) -> Path:
    """Write the config of a bf16 run that starts from the folder, with the model section that `from-hf` wrote."""
    found = json.loads((options.work / "ours" / "0" / "config.json").read_text())
    model = {key: value for key, value in found["model"].items() if key in KEYS and value is not None}
    path = options.work / "config.py"
    path.write_text(
        f"""model_type = {found["model_type"]!r}
model = dict({", ".join(f"{key}={value!r}" for key, value in model.items())}, dtype="torch.bfloat16", checkpoint=0.0)
data = dict(
    train_folder={str(train)!r}, seq_len=512, micro_bsz=2, micro_num=2, total_steps={options.steps}, num_worker=0,
)
adam = dict(lr=2e-5)
lr_scheduler = dict(total_steps={options.steps}, warmup_ratio=0.1)
hybrid_zero_optimizer = dict(clip_grad_norm=1.0)
enable_tb = False
ckpt = dict(
    save_ckpt_folder={str(options.work / "checkpoints")!r},
    checkpoint_every={options.steps},
    load_ckpt_info=dict(path={str(options.hf.resolve())!r}, content=("model",), ckpt_type="hf"),
)
"""
    )
    return path


KEYS = (
    "vocab_size", "hidden_size", "num_layers", "num_attention_heads", "num_kv_attention_heads", "head_dim",
    "intermediate_size", "tie_word_embeddings", "layer_norm_epsilon", "max_position_embeddings", "rope_base",
    "rope_scaling", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "sliding_window", "use_sliding_window",
    "max_window_layers",
)  # fmt: skip


def report(what: str, value: object) -> None:
    """Print one line of the result."""
    print(f"{what:<60} {value:.8g}" if isinstance(value, float) else f"{what:<60} {value}", flush=True)


if __name__ == "__main__":
    main()
