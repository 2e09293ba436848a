"""Converts the state of an InternEvo run other than weights to that of a native checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from internlm.checkpoint.tensor_files import OptimizerState
from internlm.checkpoint.weight_source import LazyTensor
from internlm.config.schema import Config
from internlm.convert.internevo_folder import InternEvoFolder
from internlm.convert.internevo_optimizer import InternEvoOptimizer
from internlm.convert.internevo_shards import KINDS
from internlm.core.hooks import TrainState

RUN_SECTIONS = ("adam", "lr_scheduler", "beta2_scheduler", "grad_scaler", "hybrid_zero_optimizer")
"""Sections of the config that belong to the optimizer state."""


def run_state(
    optimizer: InternEvoOptimizer, weights: InternEvoFolder, counters: Mapping[str, Any], step: int
) -> OptimizerState:
    """Masters and moments of all weights, computed on demand, and the counters.

    Args:
        optimizer: of the checkpoint.
        weights: of the same checkpoint; joins the shards of a tensor.
        counters: content of `context.pt`.
        step: optimizer steps that the run had taken.
    """
    tensors: dict[str, LazyTensor] = {}
    for name in weights.names():
        for kind in KINDS:
            # A weight in fp32 is its own master.
            if kind != "master" or weights.dtype(name) != torch.float32:
                read = _reader(weights, optimizer, name, kind)
                tensors[f"{kind}/{name}"] = LazyTensor(weights.shape(name), torch.float32, read)
    state = TrainState(step, num_consumed_tokens=int(counters.get("num_consumed_tokens", 0)))
    context = {
        "state": asdict(state),
        "inf_nan_skip_batches": float(counters.get("inf_nan_skip_batches", 0)),
        "num_updates": optimizer.num_updates,
        "scaler": optimizer.scaler,
    }
    return OptimizerState(tensors, context)


def _reader(weights: InternEvoFolder, optimizer: InternEvoOptimizer, name: str, kind: str) -> Callable[[], Tensor]:
    return lambda: weights.read(name, optimizer.of_kind(kind))


def not_imported(counters: Mapping[str, Any]) -> Iterator[str]:
    """One line for each part of InternEvo's run that is not imported."""
    yield (
        "the data position (sampler.pt) is not imported, because samples have another order here: the run starts at "
        "the first sample of its data, and counts samples and tokens from 0"
    )
    yield "random states are not imported: InternEvo saves none, and the run starts from its seed"
    if counters.get("tensorboard_folder"):
        yield (
            f"TensorBoard's folder was {counters['tensorboard_folder']}: set resume_tb_folder to it to continue its "
            "curves"
        )


def differences(optimizer: InternEvoOptimizer, config: Config, counters: Mapping[str, Any], step: int) -> Iterator[str]:
    """One line for each difference between files and config, or between InternEvo and this package."""
    if step and not optimizer.num_updates:
        yield f"the optimizer files of step {step} have no moments: they start at zero"
    elif optimizer.num_updates != step:
        yield f"AdamW has taken {optimizer.num_updates} updates in {step} steps; both counts are imported"
    num_batches = int(counters.get("batch_count", step - 1)) + 1
    if num_batches > step:
        yield (
            f"InternEvo had read {num_batches} batches for these {step} updates, and ends at batch total_steps: the "
            f"schedules continue at step {step}, so this run takes {num_batches - step} more step(s)"
        )
    adam = config.adam
    for name, key in (("eps", "adam_eps"), ("weight_decay", "weight_decay")):
        yield from _other_value(f"adam.{key}", getattr(adam, key), optimizer.options.get(name))
    if optimizer.options:
        yield from _other_value("adam.adam_beta1", adam.adam_beta1, optimizer.options["betas"][0])
    yield "adam.weight_decay_norms_and_biases = True: InternEvo decays every parameter; the config of your run decides"


def schedule_differences(
    options: Mapping[str, Any], step: int, lr: Callable[[int], float], beta2: Callable[[int], float]
) -> Iterator[str]:
    """One line for each schedule of the config that disagrees with the optimizer files.

    Args:
        options: of the optimizer files: the lr of the next step, and betas with the beta2 of the last step.
        step: number of the next step, from 0.
        lr: learning rate by step.
        beta2: beta2 by step.
    """
    if not options:
        return
    if not math.isclose(lr(step), options["lr"], rel_tol=1e-6, abs_tol=1e-12):
        yield (
            f"the optimizer's learning rate is {options['lr']:g}, the config's schedule gives {lr(step):g} at step "
            f"{step}: the run continues with the schedule of the config that you train with"
        )
    expected = [beta2(max(0, step - 1)), beta2(step)]
    if not any(math.isclose(one, options["betas"][1], rel_tol=1e-6) for one in expected):
        yield f"the optimizer's beta2 is {options['betas'][1]:g}, the config's is {expected[1]:g} at step {step}"


def _other_value(key: str, configured: float, found: float | None) -> Iterator[str]:
    if found is not None and not math.isclose(configured, found, rel_tol=1e-9):
        yield f"{key} = {configured:g} in the config, {found:g} in the optimizer files: the config takes precedence"
