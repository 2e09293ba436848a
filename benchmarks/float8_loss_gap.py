"""Loss gap between the same training in bf16 and in float8.

    python benchmarks/float8_loss_gap.py [--steps 200] [--threads 2] [--device cpu] [--every-layer] [--seed 0]

Both runs train the same model from the same weights on the same batches: bytes of the source code of Python's standard
library, which is available everywhere. A loss is the mean of the last 20 steps; the gap is relative to bf16. On a
device without float8 units the GEMMs are emulated with the same rounding.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor

from internlm.config.schema import ModelConfig
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.core.parallel.parallelize import parallelize
from internlm.data.batch import Batch, MicroBatch
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.ops.float8 import scaled_gemm as float8
from internlm.model.registry import build_model
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer

LAYERS, HIDDEN, SEQ_LEN, ROWS = 4, 256, 256, 8
RATE, WARMUP, LAST = 2e-3, 20, 20


def corpus() -> Tensor:
    """The concatenated bytes of the standard library's modules, int64 `[n]`."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def batches(text: Tensor, steps: int, seed: int, device: torch.device) -> list[Batch]:
    """One micro-batch per step, with rows from random positions."""
    draw = random.Random(seed)
    positions = torch.arange(SEQ_LEN, device=device).expand(ROWS, -1)
    made = []
    for _ in range(steps):
        starts = [draw.randrange(len(text) - SEQ_LEN) for _ in range(ROWS)]
        rows = torch.stack([text[start : start + SEQ_LEN + 1] for start in starts]).to(device)
        types = torch.zeros_like(rows[:, 1:])
        made.append(Batch([MicroBatch(rows[:, :-1], rows[:, 1:], positions, types, None, None, ROWS * SEQ_LEN)], ROWS))
    return made


def build(layers: range, seed: int, context: ParallelContext) -> Engine:
    """An engine for the model, with the GEMMs of some layers in float8."""
    config = ModelConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=3 * HIDDEN,
        dtype="torch.bfloat16",
    )
    with torch.device("meta"):
        model = build_model("LLAMA2", config)
    parallelize(model, context, seed=seed, options=ParallelOptions(float8_layers=layers))
    optimizer = HybridZeroOptimizer(model, context, weight_decay=0.1, clip_grad_norm=1.0)
    return Engine(model, optimizer, context, linear_cross_entropy)


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then cosine decay to a tenth."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    return RATE * (0.55 + 0.45 * math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--every-layer", action="store_true", help="use float8 in the first and last layer too")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    context = ParallelContext.create(ParallelLayout(), options.device)
    data = batches(corpus(), options.steps, options.seed, options.device)
    chosen = range(LAYERS) if options.every_layer else range(1, LAYERS - 1)
    print(f"float8 in layers {list(chosen)} of {LAYERS}: {float8.choice(options.device).implementation}")
    losses: dict[str, list[float]] = {}
    for name, layers in (("bf16", range(0)), ("float8", chosen)):
        engine, started = build(layers, options.seed, context), time.perf_counter()
        found = [engine.train_step(batch, rate(step, options.steps)).loss for step, batch in enumerate(data)]
        losses[name] = [float(loss) for loss in found]
        print(f"{name}: {(time.perf_counter() - started) / options.steps:.3f} s/step")
    print(f"{'step':>5} {'bf16':>8} {'float8':>8} {'gap':>8}")
    for step in range(50, options.steps + 1, 50):
        bf16, fp8 = (statistics.fmean(losses[name][max(0, step - LAST) : step]) for name in losses)
        print(f"{step:>5} {bf16:>8.4f} {fp8:>8.4f} {(fp8 - bf16) / bf16:>+8.2%}")


if __name__ == "__main__":
    main()
