"""What a step costs outside forward, backward and optimizer, with all hooks on; and how far the loader is ahead.

    python benchmarks/loop_overhead.py --train DIR [--steps 30] [--threads 2]

Trains the 16.9 M model (hidden 384, 6 layers, 6 heads, ffn 1024, vocab 8192; 8 x 512 tokens a step, bf16) through
`build_trainer`, with the console, metrics.jsonl and TensorBoard, and counts the wall time of the loop that is neither
forward and backward nor optimizer. Then reads the same data with the loader alone.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from internlm.config.schema import CkptConfig, Config, DataConfig, ModelConfig
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import Hook
from internlm.initialize.build import build_loader, build_trainer
from internlm.utils.logging import configure_logging

WARMUP = 3


class Clock(Hook):
    """Wall time and computing time of all steps after the first few."""

    name = "clock"

    def __init__(self) -> None:
        self.computing = 0.0
        self.started = self.ended = 0.0
        self.steps = 0

    def on_step_start(self, trainer: Any) -> None:
        # Up to the start of the next step: what the hooks of a step take counts.
        self.ended = time.perf_counter()
        if trainer.state.step == WARMUP:
            self.started = self.ended
            self.computing = 0.0
        self.steps = trainer.state.step - WARMUP

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        # The step that follows the last start has no end on this clock.
        if trainer.state.step < trainer.total_steps:
            self.computing += metrics.seconds["forward_backward"] + metrics.seconds["optimizer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="tokenized folder with ids below 8192")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    configure_logging()
    config = Config(
        JOB_NAME="overhead",
        model_type="LLAMA2",
        model=ModelConfig(
            vocab_size=8192, hidden_size=384, num_layers=6, num_attention_heads=6, intermediate_size=1024
        ),
        data=DataConfig(train_folder=options.train, seq_len=512, micro_bsz=8, total_steps=options.steps, num_worker=0),
        ckpt=CkptConfig(enable_save_ckpt=False, auto_resume=False),
    )
    context = ParallelContext.create()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, context, Path(folder))
        clock = Clock()
        trainer.hooks.append(clock)
        trainer.fit()
    wall = clock.ended - clock.started
    tokens = clock.steps * config.data.packed_length
    print(f"{clock.steps} steps: {tokens / wall:.0f} tokens/s; {100 * (1 - clock.computing / wall):.2f} % outside")
    loader = build_loader(config, context)
    batches = iter(loader)
    for _ in itertools.islice(batches, WARMUP):
        pass
    started = time.perf_counter()
    read = sum(batch.num_tokens for batch in itertools.islice(batches, options.steps - WARMUP))
    rate = read / (time.perf_counter() - started)
    print(f"loader alone: {rate:.0f} tokens/s, {rate * wall / tokens:.0f}x what training eats")


if __name__ == "__main__":
    main()
