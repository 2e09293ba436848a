"""Peak memory of `internlm convert` with the shapes of the published InternLM2-7B in bf16.

    python benchmarks/conversion_memory.py --work trial

Creates a folder (15.5 GB), converts it with `from-hf`, deletes it, and converts the checkpoint with `to-hf`
to the transformers layout, which splits every wqkv. Needs twice the size on the disk. The peak is the largest resident
set of the converting process; its resident set after all imports is printed too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm.checkpoint.weight_source import LazyTensor
from internlm.convert.safetensors_file import shard, write_safetensors

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 92544

CHILD = """
import resource, sys, time
from internlm.cli import main
import internlm.commands.convert, transformers
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
before, start = peak(), time.perf_counter()
assert main(["convert", *sys.argv[1:]]) == 0
print(f"peak {peak():.2f} GB, of which {before:.2f} GB before; {time.perf_counter() - start:.0f} s", file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="new folder for all output")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model (default: 32)")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    hf, ours, back = (options.work / name for name in ("hf", "ours", "back"))
    # In its own process, because a child process inherits the peak of its parent.
    maker = multiprocessing.get_context("spawn").Process(target=make_folder, args=(hf, options.layers))
    maker.start()
    maker.join()
    assert maker.exitcode == 0
    largest = VOCAB * HIDDEN * 2
    print(f"largest tensor: {largest / 1e9:.2f} GB", flush=True)
    convert("from-hf", "--hf", hf, "--out", ours)
    shutil.rmtree(hf)
    convert("to-hf", "--ckpt", ours, "--out", back)


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published checkpoint."""
    found: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        found[f"{name}attention.wqkv.weight"] = ((HEADS + 2 * KV_HEADS) * HIDDEN // HEADS, HIDDEN)
        found[f"{name}attention.wo.weight"] = (HIDDEN, HIDDEN)
        found[f"{name}feed_forward.w1.weight"] = found[f"{name}feed_forward.w3.weight"] = (FFN, HIDDEN)
        found[f"{name}feed_forward.w2.weight"] = (HIDDEN, FFN)
        found[f"{name}attention_norm.weight"] = found[f"{name}ffn_norm.weight"] = (HIDDEN,)
    return {**found, "model.norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN)}


def make_folder(folder: Path, layers: int) -> None:
    """Write a folder of the published layout, in files of 2 GB."""
    folder.mkdir()
    config = {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    block = torch.randn(1 << 20).bfloat16()

    def read(shape: tuple[int, ...]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return block.repeat(-(-size // block.numel()))[:size].view(shape)

    tensors = {
        name: LazyTensor(shape, torch.bfloat16, lambda shape=shape: read(shape))  # type: ignore[misc]
        for name, shape in shapes(layers).items()
    }
    sizes = {name: 2 * torch.Size(tensor.shape).numel() for name, tensor in tensors.items()}
    weight_map = {}
    for number, names in enumerate(shard(sizes, 2_000_000_000)):
        file = f"model-{number:05}.safetensors"
        with open(folder / file, "wb") as stream:
            write_safetensors(stream, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    print(f"{layers} layers, {sum(sizes.values()) / 1e9:.1f} GB", flush=True)


def convert(*words: object) -> None:
    """Run one conversion in its own process, and print its peak."""
    child = [sys.executable, "-c", CHILD, *map(str, words)]
    done = subprocess.run(child, cwd=ROOT, check=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    print(f"{words[0]}: {done.stderr.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
