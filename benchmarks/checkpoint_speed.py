"""Bandwidth of saving and loading checkpoints, the stall of training during a save, and the peak memory of each.

    python benchmarks/checkpoint_speed.py [--folder DIR] [--layers 8] [--rounds 5]

Builds a bf16 model with InternLM2's shapes (hidden 2048, with fp32 masters and moments), and saves and loads its whole
training state on the disk of DIR: with `CheckpointManager` (checksums, fsync), with `torch.save` of the same bytes
followed by fsync, and with `CheckpointManager(async_save=True)`, for which the duration of the call is measured. Rounds
are interleaved; the figures are medians. All files are read from the page cache. Peak memory is measured in separate
processes, as the growth of the resident set in multiples of the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from internlm.checkpoint.manager import CheckpointManager
from internlm.checkpoint.reading import load_tensors
from internlm.checkpoint.run_state import model_tensors, optimizer_tensors
from internlm.config.schema import ModelConfig
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import TrainState
from internlm.core.parallel.parallelize import parallelize
from internlm.model.registry import build_model
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.utils.storage import storage_path


def state_of_a_run(layers: int) -> Any:
    """A stand-in for a trainer, with everything that a checkpoint needs."""
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=layers, hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_kv_attention_heads=8,
        vocab_size=32000, dtype="torch.bfloat16",
    )  # fmt: skip
    context = ParallelContext.create()
    with torch.device("meta"):
        model = build_model("INTERNLM2", config)
    optimizer = HybridZeroOptimizer(parallelize(model, context), context)
    for _, _, pieces in optimizer.sharded_state():
        for _, piece in pieces:
            piece.normal_()
    return SimpleNamespace(
        engine=SimpleNamespace(optimizer=optimizer),
        state=TrainState(),
        context=context,
        train_loader=None,
        hooks=[],
        num_skipped_updates=torch.zeros(()),
    )


def tensors_of(trainer: Any) -> dict[str, torch.Tensor]:
    """The same tensors, unsharded, as passed to torch.save."""
    optimizer = trainer.engine.optimizer
    boxed = {**model_tensors(*optimizer.chunks), **optimizer_tensors(optimizer)}
    return {key: value.pieces[0][1] for key, value in boxed.items()}


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def torch_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with open(path, "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def torch_load(tensors: dict[str, torch.Tensor], path: Path) -> None:
    for key, value in torch.load(path, weights_only=True).items():
        tensors[key].copy_(value)


def speed(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Median seconds of each method."""
    trainer = state_of_a_run(options.layers)
    # Copied, because torch.save would write the whole buffer of each of the optimizer's views.
    plain = {key: value.clone() for key, value in tensors_of(trainer).items()}
    num_bytes = sum(value.numel() * value.element_size() for value in plain.values())
    manager = CheckpointManager(folder / "ours", keep_latest=1)
    background = CheckpointManager(folder / "background", keep_latest=1, async_save=True)
    times: dict[str, list[float]] = {}

    def run(name: str, action: Callable[[], object]) -> None:
        times.setdefault(name, []).append(seconds(action))

    def save_in_background() -> None:
        background.save(trainer)

    for number in range(options.rounds + 1):
        trainer.state.step = number
        run("save", lambda: manager.save(trainer))
        run("torch.save", lambda: torch_save(plain, folder / "plain.pt"))
        path = storage_path(folder / "ours" / str(number))
        run("load", lambda path=path: manager.load(trainer, path))
        run("load without checksums", lambda path=path: load_tensors(path, _boxed(trainer), no_dist=True))
        run("torch.load", lambda: torch_load(plain, folder / "plain.pt"))
        run("stall of a background save", save_in_background)
        run("rest of a background save", background.drain)
        if number == 0:
            # The first round allocates and maps memory.
            times.clear()
    background.finish()
    failed = [result.error for result in (*manager.poll(), *background.poll()) if result.error]
    if failed:
        raise SystemExit(f"a save failed: {failed[0]}")
    return {"GB": num_bytes / 1e9, **{name: statistics.median(values) for name, values in times.items()}}


def _boxed(trainer: Any) -> dict[str, Any]:
    optimizer = trainer.engine.optimizer
    return {**model_tensors(*optimizer.chunks), **optimizer_tensors(optimizer)}


def peak(action: str, options: argparse.Namespace, folder: Path) -> None:
    """Print the growth of the resident set during one save or load, and the size of the largest tensor.

    Runs in its own process.
    """
    trainer = state_of_a_run(options.layers)
    manager = CheckpointManager(folder / "ours")
    largest = max(value.numel() * value.element_size() for value in tensors_of(trainer).values())
    _reset_peak()
    before = _resident_bytes("VmRSS")
    if action == "save":
        manager.save(trainer)
    else:
        newest = max(int(name) for name in os.listdir(folder / "ours") if name.isdigit())
        manager.load(trainer, folder / "ours" / str(newest))
    grown = _resident_bytes("VmHWM") - before
    print(f"  {action}: +{grown / 1e6:.0f} MB = {grown / largest:.2f} of the largest tensor ({largest / 1e6:.0f} MB)")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="checkpoint-speed-"))
    try:
        found = speed(options, folder)
        size = found.pop("GB")
        print(f"{size:.2f} GB of weights, masters and moments")
        for name, value in found.items():
            print(f"  {name:<28} {value:6.2f} s  {size / value:6.2f} GB/s")
        print(f"  save: {found['torch.save'] / found['save']:.2f} x the bandwidth of torch.save")
        print(f"  load: {found['torch.load'] / found['load']:.2f} x the bandwidth of torch.load")
        print(json.dumps({"GB": size, **found}))
        for action in ("save", "load"):
            process = multiprocessing.get_context("spawn").Process(target=peak, args=(action, options, folder))
            process.start()
            process.join()
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
