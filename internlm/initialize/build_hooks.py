"""Builds the hooks of a training run, in call order, from a config."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path

import torch
from torch import nn

from internlm.checkpoint.hook import CheckpointHook
from internlm.checkpoint.stop_file import StopFileHook
from internlm.config.schema import Config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.hooks import Hook
from internlm.core.routing_replay import RoutingReplay
from internlm.data.loaders.train_loader import TrainLoader
from internlm.estimate.flops import peak_flops
from internlm.eval.hook import EvaluationHook
from internlm.initialize.model_flops import token_flops
from internlm.initialize.sample_texts import build_sample_texts
from internlm.initialize.stages import parameter_groups
from internlm.initialize.user_hooks import build_user_hooks, check_names
from internlm.initialize.vision_costs import vision_dimensions
from internlm.model.llava.model import Llava
from internlm.monitor.console import ConsoleHook
from internlm.monitor.garbage_collection import GarbageCollectionHook
from internlm.monitor.health import HealthHook
from internlm.monitor.metrics_collector import MetricsCollector
from internlm.monitor.metrics_file import MetricsFileHook
from internlm.monitor.profiler import ProfilerHook
from internlm.monitor.tensorboard import TensorBoardHook
from internlm.monitor.throughput import FlopsModel, Throughput
from internlm.solver.optimizer.nonfinite import describe_failed_update
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.paths import expand_home

logger = get_logger(__name__)


def build_hooks(
    config: Config,
    context: ParallelContext,
    run_dir: Path,
    engine: Engine,
    train_loader: TrainLoader,
    *,
    profiling: bool = False,
) -> list[Hook]:
    """The hooks of the loop in call order: built-in ones, then those of `config.hooks`."""
    flops = build_flops(config, context.device, engine.chunks[0])
    collector = MetricsCollector(Throughput(context.world_size, flops), progress_at=train_loader.progress_at)
    hooks: list[Hook] = [GarbageCollectionHook(config.data.empty_cache_and_diag_interval)]
    hooks.append(ConsoleHook(collector, config.monitor.log_every, config.monitor.log_format))
    hooks += routing_replays(config, engine)
    if config.monitor.metrics_file:
        hooks.append(MetricsFileHook(collector))
    if config.enable_tb:
        # InternEvo reads the same environment variables.
        folder = config.tensorboard_folder or expand_home(os.environ.get("tensorboard_folder", ""))  # noqa: SIM112
        resumed = config.resume_tb_folder or expand_home(os.environ.get("resume_tb_folder", ""))  # noqa: SIM112
        hooks.append(
            TensorBoardHook(
                collector,
                Path(folder) if folder else None,
                Path(resumed) if resumed else None,
                config.tensorboard.queue_max_length,
            )
        )
    if profiling:
        hooks.append(ProfilerHook())
    if config.ckpt.enable_save_ckpt:
        assert config.ckpt.checkpoint_every is not None
        hooks.append(CheckpointHook(config.ckpt.checkpoint_every, config.ckpt.oss_snapshot_freq))
    # After the checkpoint hook: a failing evaluation must not lose the steps before it.
    if config.data.valid_every > 0 and (config.data.has_valid_sets or config.data.multiple_choice):
        hooks.append(EvaluationHook(config.data.valid_every, at_start=config.data.valid_at_start))
    if config.data.generate_every > 0:
        hooks.append(build_sample_texts(config))
    if config.ckpt.stop_file_path is not None:
        hooks.append(StopFileHook(Path(config.ckpt.stop_file_path.removeprefix("local:"))))
    hooks.append(build_health(config, collector, engine, train_loader))
    user_hooks = build_user_hooks(config.hooks)
    check_names(hooks, user_hooks)
    return [*hooks, *user_hooks]


def routing_replays(config: Config, engine: Engine) -> list[Hook]:
    """The hook that writes or reads the routing of experts, if the config asks for one."""
    write, read = (
        None if folder is None else Path(folder.removeprefix("local:"))
        for folder in (config.moe.replay.write, config.moe.replay.read)
    )
    return [RoutingReplay(engine, write=write, read=read)] if write or read else []


def build_health(config: Config, collector: MetricsCollector, engine: Engine, train_loader: TrainLoader) -> HealthHook:
    """Build the hook that ends a run that no longer learns."""
    optimizer = engine.optimizer
    data, scaler = config.data, config.grad_scaler
    scale_can_shrink = config.model.torch_dtype == torch.float16 and scaler.backoff_factor < 1
    reasons = "every token is masked (negative in the .bin)"
    if not data.use_packed_dataset:
        reasons += f", or every prompt is longer than data.seq_len = {data.seq_len}, where documents are truncated"
    return HealthHook(
        collector,
        max_skipped=config.monitor.max_skipped_updates,
        smallest_scale=scaler.scale_bounds[0] if scale_can_shrink else math.inf,
        find_cause=partial(describe_failed_update, optimizer),
        samples_per_epoch=train_loader.num_samples_per_epoch,
        max_bad_documents=data.max_bad_documents,
        why_no_label=f"The likely reason: {reasons}; see doc/data.md",
    )


def build_flops(config: Config, device: torch.device, model: nn.Module) -> FlopsModel | None:
    """FLOPs of a token and of a picture, for the tflops and mfu metrics; None, and a line, where they are not known."""
    try:
        flops = token_flops(config, model)
    except ConfigError as error:
        logger.info("tflops and mfu are left out of the metrics: %s", error)
        return None
    if config.monitor.peak_tflops is not None:
        peak: float | None = config.monitor.peak_tflops * 1e12
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(name, config.model.torch_dtype)
    per_picture = 0.0
    if isinstance(model, Llava):
        vision = vision_dimensions(model, parameter_groups(config))
        per_picture = vision.tower_flops + vision.projector_flops
    return FlopsModel(flops.full, flops.causal, peak, per_picture=per_picture)
