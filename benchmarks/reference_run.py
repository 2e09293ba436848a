"""Time to a target loss on real text: this project against a handwritten PyTorch loop of the same shape, in one run.

    python benchmarks/reference_run.py --train DIR --valid DIR [--steps 880] [--batch 2] [--peak 1.5e-3]

DIR are tokenized folders (tools/tokenizer.py; a BPE of 8,192 tokens). Both train the 16.9 M model (hidden 384,
6 layers, 6 heads, ffn 1024) on the same `--batch` x 512 tokens per step in the same order, in bf16, with the same
learning rate. They alternate in slices of `--slice` steps, each in its own process, so that other load on the machine
affects both. Time is counted for loading, forward, backward and update. The held-out loss is measured between slices,
outside the timing. Like most handwritten loops, this one does not separate documents; both are evaluated on the same
rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

HIDDEN, LAYERS, HEADS, FFN, VOCAB, SEQ = 384, 6, 6, 1024, 8192, 512
CONTENDERS = ("ours", "plain")


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, then linear decay to a tenth of the peak."""
    warmup = max(steps // 10, 1)
    return peak * (step + 1) / warmup if step < warmup else peak * (1 - 0.9 * (step - warmup) / (steps - warmup))


def build_ours(options: argparse.Namespace) -> tuple[Callable[[int], None], Callable[[Any], Any]]:
    """Build this project's run; returns functions for one step and for the loss of rows."""
    import torch

    from internlm.config.schema import ModelConfig
    from internlm.core.context.parallel_context import ParallelContext
    from internlm.core.engine import Engine
    from internlm.core.parallel.parallelize import parallelize
    from internlm.data.loaders.train_loader import build_train_loader
    from internlm.data.sources.open_source import open_source
    from internlm.data.sources.sample_stream import ShuffledSource
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
        dtype="torch.bfloat16",
    )
    with torch.device("meta"):
        model = build_model("LLAMA2", config)
    context = ParallelContext.create()
    parallelize(model, context)
    optimizer = HybridZeroOptimizer(model, context, ConstantGradScaler(), weight_decay=0.1, clip_grad_norm=1.0)
    engine = Engine(model, optimizer, context, linear_cross_entropy)
    batches = iter(
        build_train_loader(
            ShuffledSource(
                open_source(options.train, seq_len=SEQ, micro_bsz=options.batch, packing="cut", vocab_size=VOCAB),
                seed=1,
            ),
            micro_num=1,
        )
    )

    def step(number: int) -> None:
        float(engine.train_step(next(batches), learning_rate(number, options.steps, options.peak)).loss)

    def losses(rows: Any) -> Any:
        inputs, labels = rows.unbind(1)
        logits = model.logits(model(inputs, torch.arange(SEQ).expand_as(inputs)))
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return step, losses


def build_plain(options: argparse.Namespace) -> tuple[Callable[[int], None], Callable[[Any], Any]]:
    """The same for plain PyTorch."""
    import torch
    from plain_pytorch import Llama
    from torch.nn import functional as F

    from internlm.data.loaders.train_loader import build_train_loader
    from internlm.data.sources.open_source import open_source
    from internlm.data.sources.sample_stream import ShuffledSource

    model = Llama(VOCAB, HIDDEN, LAYERS, HEADS, FFN, SEQ)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = iter(
        build_train_loader(
            ShuffledSource(
                open_source(
                    options.train,
                    seq_len=SEQ,
                    micro_bsz=options.batch,
                    packing="pack_sample_into_one",
                    vocab_size=VOCAB,
                ),
                seed=1,
            ),
            micro_num=1,
        )
    )

    def step(number: int) -> None:
        micro = next(batches).micro_batches[0]
        optimizer.param_groups[0]["lr"] = learning_rate(number, options.steps, options.peak)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(micro.input_ids.view(options.batch, SEQ))
            loss = F.cross_entropy(logits.view(-1, VOCAB), micro.labels.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    def losses(rows: Any) -> Any:
        inputs, labels = rows.unbind(1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return step, losses


def held_out_rows(folder: str, count: int) -> Any:
    """int64 `[count, 2, SEQ]`: inputs and labels of a valid folder's rows that have no padding."""
    import torch

    from internlm.data.documents.valid_sets import folder_sets
    from internlm.data.loaders.valid_loader import build_valid_loaders
    from internlm.data.tokenized_files.file_format import TOKENIZED

    sets = folder_sets(folder, TOKENIZED)
    loaders = build_valid_loaders(sets, seq_len=SEQ, micro_bsz=1, vocab_size=VOCAB, packed=False)
    rows = (
        torch.stack((micro.input_ids, micro.labels), dim=1)
        for loader in loaders.values()
        for batch in loader
        for micro in batch.micro_batches
        if micro.num_valid_tokens == SEQ
    )
    return torch.cat(list(itertools.islice(rows, count)))


def serve(name: str, options: argparse.Namespace) -> None:
    """Train one slice per line of stdin, and answer each with a line of JSON."""
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    step, losses = (build_ours if name == "ours" else build_plain)(options)
    rows = held_out_rows(options.valid, 32)
    done, seconds = 0, 0.0

    def report() -> None:
        with torch.no_grad():
            loss = float(torch.stack([losses(chunk) for chunk in rows.split(8)]).mean())
        print(json.dumps({"step": done, "seconds": seconds, "loss": loss}), flush=True)

    report()
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(min(options.slice, options.steps - done)):
            step(done)
            done += 1
        seconds += time.perf_counter() - started
        report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--steps", type=int, default=880, help="880 steps of 2 x 512 are 0.9 M tokens")
    parser.add_argument("--batch", type=int, default=2, help="sequences of 512 tokens per step")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--only", choices=CONTENDERS, help="run only one of the two")
    parser.add_argument("--slice", type=int, default=20)
    parser.add_argument("--target", type=float, default=5.32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options)
        return
    contenders = (options.only,) if options.only else CONTENDERS
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--serve", name, *sys.argv[1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in contenders
    }
    reached: dict[str, float] = {}
    print(f"{'step':>6} " + " ".join(f"{name + ' s':>8} {'loss':>8}" for name in contenders), flush=True)
    for turn in range(options.steps // options.slice + 1):
        answers = {}
        for name, process in processes.items():
            assert process.stdin is not None and process.stdout is not None
            if turn > 0:
                process.stdin.write("go\n")
                process.stdin.flush()
            answers[name] = json.loads(process.stdout.readline())
            if answers[name]["loss"] <= options.target:
                reached.setdefault(name, answers[name]["seconds"])
        cells = (f"{answer['seconds']:>8.1f} {answer['loss']:>8.3f}" for answer in answers.values())
        print(f"{answers[contenders[0]]['step']:>6} " + " ".join(cells), flush=True)
    for process in processes.values():
        process.kill()
    for name in contenders:
        print(f"{name}: loss {options.target} after {reached.get(name, float('nan')):.1f} s of training")
    if len(contenders) == 2:
        ratio = answers["ours"]["seconds"] / answers["plain"]["seconds"]
        print(f"time of ours / plain for {options.steps} steps: {ratio:.2f}")


if __name__ == "__main__":
    main()
