"""Overhead of parallel linear layers without communication, against plain layers in one process.

    python benchmarks/parallel_overhead.py [--rounds 10] [--steps 3] [--threads 1] [--hidden 384] [--tokens 512]

Both train the same model on the same batch, in rounds of `--steps` steps in random order; the ratio is that of the
medians. The parallel layers are those of isp with one sequence rank and one weight rank.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch

from internlm.config.schema import ModelConfig
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.parallel.parallelize import parallelize
from internlm.data.batch import Batch, MicroBatch
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer

VOCAB = 8192


def build(mode: str, hidden: int) -> Engine:
    """An engine for a 6-layer model."""
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_layers=6,
        num_attention_heads=hidden // 64,
        intermediate_size=hidden * 8 // 3,
        dtype="torch.float32",
    )
    with torch.device("meta"):
        model = build_model("LLAMA2", config)
    context = ParallelContext.create(ParallelLayout(mode="isp" if mode == "parallel" else "mtp"))
    parallelize(model, context)
    return Engine(model, HybridZeroOptimizer(model, context), context, linear_cross_entropy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = torch.randint(0, VOCAB, (1, options.tokens + 1))
    positions = torch.arange(options.tokens)[None]
    micro = MicroBatch(
        tokens[:, :-1], tokens[:, 1:], positions, torch.zeros_like(positions), None, None, options.tokens
    )
    engines = {name: build(name, options.hidden) for name in ("plain", "parallel")}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.train_step(Batch([micro], 1), 1e-4)
    for _ in range(options.rounds):
        for name in random.sample(list(engines), len(engines)):
            started = time.perf_counter()
            for _ in range(options.steps):
                engines[name].train_step(Batch([micro], 1), 1e-4)
            seconds[name].append((time.perf_counter() - started) / options.steps)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<9} {1e3 * median:8.1f} ms/step (fastest {1e3 * min(seconds[name]):.1f})")
    print(f"parallel / plain: {medians['parallel'] / medians['plain']:.3f}")


if __name__ == "__main__":
    main()
