"""Training throughput and memory on a CPU against what a user would pick instead, as ratios, in one run.

    python benchmarks/cpu_throughput.py [--rounds 5] [--steps 3] [--threads 2]

Contenders train the same shape (a Llama: hidden 384, 6 layers, 6 heads, ffn 1024, vocab 8192) on the same tokens
(8 x 512 a step), uncompiled, each in a process of its own. Rounds are interleaved, so that what else the machine does
hits all of them; a contender's figure is its median round. Memory is the peak resident set, less what the process held
before it built the model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

HIDDEN, LAYERS, HEADS, FFN, VOCAB, SEQ, BATCH = 384, 6, 6, 1024, 8192, 512, 8
CONTENDERS = ("ours-fp32", "hf-fp32", "ours-bf16", "hf-bf16-autocast", "hf-bf16-weights")
RATIOS = (("ours-fp32", "hf-fp32"), ("ours-bf16", "hf-bf16-autocast"), ("ours-bf16", "hf-bf16-weights"))


def build_ours(dtype: str) -> Callable[[Any], Any]:
    """A step of this project's engine."""
    import torch

    from internlm.config.schema import ModelConfig
    from internlm.core.context.parallel_context import ParallelContext
    from internlm.core.engine import Engine
    from internlm.core.parallel.parallelize import parallelize
    from internlm.data.batch import Batch, MicroBatch
    from internlm.model.ops.cross_entropy import linear_cross_entropy
    from internlm.model.registry import build_model
    from internlm.solver.grad_scaler import ConstantGradScaler
    from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer

    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        dtype=f"torch.{dtype}",
    )
    with torch.device("meta"):
        model = build_model("LLAMA2", config)
    context = ParallelContext.create()
    optimizer = HybridZeroOptimizer(parallelize(model, context), context, ConstantGradScaler(), clip_grad_norm=1.0)
    engine = Engine(model, optimizer, context, partial(linear_cross_entropy, with_accuracy=True))

    def step(tokens: Any) -> float:
        micro = MicroBatch(
            input_ids=tokens[:, :-1],
            labels=tokens[:, 1:],
            position_ids=torch.arange(SEQ).expand(BATCH, SEQ),
            type_ids=torch.zeros(BATCH, SEQ, dtype=torch.int64),
            cu_seqlens=None,
            lengths=None,
            num_valid_tokens=BATCH * SEQ,
        )
        return float(engine.train_step(Batch([micro], num_samples=1), lr=3e-4).loss)

    return step


def build_transformers(dtype: str, autocast: bool) -> Callable[[Any], Any]:
    """A plain loop around transformers' Llama with torch's fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=SEQ,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)

    def step(tokens: Any) -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            # labels are shifted inside: the same 8 x 512 predictions would need 513 inputs; it predicts 8 x 511.
            loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return step


def serve(name: str, threads: int) -> None:
    """Build a contender, then run steps on request, one line in, one line out."""
    import psutil
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if name.startswith("hf"):
        import transformers  # noqa: F401  what the import alone takes is not the model's
    before = psutil.Process().memory_info().rss
    if name.startswith("ours"):
        step = build_ours({"ours-fp32": "float32", "ours-bf16": "bfloat16"}[name])
    else:
        step = build_transformers("bfloat16" if name == "hf-bf16-weights" else "float32", name == "hf-bf16-autocast")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=generator) for _ in range(4)]
    step(batches[0])
    step(batches[1])
    print("ready", flush=True)
    for line in sys.stdin:
        steps = int(line)
        started = time.perf_counter()
        for number in range(steps):
            step(batches[number % len(batches)])
        seconds = time.perf_counter() - started
        with open("/proc/self/status", encoding="ascii") as status:
            peak = next(int(row.split()[1]) * 1024 for row in status if row.startswith("VmHWM"))
        answer = {"tokens_per_second": steps * BATCH * SEQ / seconds, "peak_bytes": peak - before}
        print(json.dumps(answer), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.threads)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    processes = {}
    for name in options.only:
        command = [sys.executable, __file__, "--serve", name, "--threads", str(options.threads)]
        processes[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert processes[name].stdout is not None and processes[name].stdout.readline() == "ready\n", name
    rates: dict[str, list[float]] = {name: [] for name in processes}
    peaks: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(f"{options.steps}\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            rates[name].append(answer["tokens_per_second"])
            peaks[name] = answer["peak_bytes"]
    for process in processes.values():
        process.kill()
    print(f"{'contender':<18} {'tokens/s median':>16} {'min':>8} {'max':>8} {'peak MB':>9}")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<18} {median:>16.0f} {min(values):>8.0f} {max(values):>8.0f} {peaks[name] / 1e6:>9.0f}")
    for ours, theirs in RATIOS:
        if ours in rates and theirs in rates:
            speed = statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))
            print(f"{ours} / {theirs}: {speed:.2f}x tokens/s, {peaks[ours] / peaks[theirs]:.2f}x peak memory")


if __name__ == "__main__":
    main()
