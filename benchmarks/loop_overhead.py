"""Overhead of the training loop outside forward, backward and optimizer, with all hooks; and speed of the loader.

    python benchmarks/loop_overhead.py --shape demo [--steps 30] [--threads 2] [--train DIR] [--set KEY=VALUE ...]

Trains a shape of `throughput.py` in bf16 with `build_trainer`, the console, metrics.jsonl and TensorBoard. On a CPU the
overhead is the wall time of the loop that is spent neither in forward and backward nor in the optimizer. A GPU works
asynchronously: there the engine alone repeats the same number of steps on batches in memory, and the overhead is the
difference. Finally the loader alone reads the same data.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from speed.contenders import LEARNING_RATE, device_of_this_machine
from speed.corpus import write_corpus
from speed.shapes import SHAPES, keys_of, write_config

from internlm.config.loader import load_config
from internlm.config.schema import Config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.hooks import Hook
from internlm.data.batch import Batch
from internlm.initialize.build import build_layout, build_trainer, set_numerics
from internlm.initialize.build_data import build_loader
from internlm.utils.logging import configure_logging

WARMUP = 3


class Clock(Hook):
    """Wall time of all steps after the first few, and the host's time in forward, backward and optimizer."""

    name = "clock"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.computing = 0.0
        self.started = self.ended = 0.0
        self.steps = 0

    def on_step_start(self, trainer: Any) -> None:
        # A step is timed up to the start of the next one, so that the time of its hooks is included.
        if trainer.state.step in (WARMUP, trainer.total_steps - 1):
            wait(self.device)
        self.ended = time.perf_counter()
        if trainer.state.step == WARMUP:
            self.started = self.ended
            self.computing = 0.0
        self.steps = trainer.state.step - WARMUP

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        # This clock has no end of the last step.
        if trainer.state.step < trainer.total_steps:
            self.computing += metrics.seconds["forward_backward"] + metrics.seconds["optimizer"]


def wait(device: torch.device) -> None:
    """Wait for all queued work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of_the_engine_alone(engine: Engine, batches: list[Batch], steps: int) -> float:
    """Wall time of `steps` steps of the engine on batches in memory."""
    wait(engine.context.device)
    started = time.perf_counter()
    for batch in itertools.islice(itertools.cycle(batches), steps):
        engine.train_step(batch, LEARNING_RATE)
    wait(engine.context.device)
    return time.perf_counter() - started


def config_of(options: argparse.Namespace, folder: Path) -> Config:
    """The config of a shape, with data if none was given."""
    shape = SHAPES[options.shape]
    train = options.train or str(folder / "train")
    keys = keys_of(shape, "bf16", layers=options.layers, folder=train)
    keys["data"]["total_steps"] = options.steps
    if not options.train:
        rows = 8 * keys["data"]["micro_bsz"] * keys["data"]["micro_num"]
        write_corpus(folder, "one", vocab=shape.vocab, seq=shape.seq, num_sequences=rows)
    write_config(folder / "config.py", keys)
    return load_config(folder / "config.py", options.set).config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu-384")
    parser.add_argument("--layers", type=int, help="number of layers (default: that of the shape)")
    parser.add_argument("--train", help="tokenized folder with ids of the shape's vocabulary (default: random tokens)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the config"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    configure_logging()
    with tempfile.TemporaryDirectory() as name:
        config = config_of(options, Path(name))
        set_numerics(config)
        context = ParallelContext.create(build_layout(config, 1), device_of_this_machine())
        trainer = build_trainer(config, context, Path(name) / "run")
        clock = Clock(context.device)
        trainer.hooks.append(clock)
        trainer.fit()
        wall = clock.ended - clock.started
        loader = build_loader(config, context)
        batches = list(itertools.islice(loader, WARMUP))
        started = time.perf_counter()
        read = sum(batch.num_tokens for batch in itertools.islice(loader, options.steps - WARMUP))
        rate = read / (time.perf_counter() - started)
        loader.close()
        computing = clock.computing
        if context.device.type == "cuda":
            computing = seconds_of_the_engine_alone(trainer.engine, batches, clock.steps)
    tokens = clock.steps * config.data.packed_length * config.data.micro_num
    print(f"{clock.steps} steps: {tokens / wall:.0f} tokens/s; {100 * (1 - computing / wall):.2f} % overhead")
    print(f"loader alone: {rate:.0f} tokens/s, {rate * wall / tokens:.0f}x the consumption of training")


if __name__ == "__main__":
    main()
