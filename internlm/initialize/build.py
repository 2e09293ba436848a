"""The one place that wires a config into a Trainer. Everything below it takes plain arguments."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import nn

from internlm.checkpoint.data_tokenizer import DATA_TOKENIZER, KnownTokenizer
from internlm.checkpoint.hook import CheckpointHook
from internlm.checkpoint.manager import CheckpointManager
from internlm.checkpoint.manifest import Manifest
from internlm.checkpoint.reading import CONFIG_FILE
from internlm.checkpoint.run_state import load_weights
from internlm.checkpoint.save_folder import resolve
from internlm.checkpoint.stop_file import StopFileHook
from internlm.config.loader import check_config
from internlm.config.schema import Config
from internlm.config.schema.ckpt import LoadCkptInfo
from internlm.config.unsupported import find_refused_in_training
from internlm.convert.checkpoint_types import open_weights, trained_as
from internlm.convert.to_hf import check_exportable, export_beside
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.hooks import Hook
from internlm.core.progress.record import Progress
from internlm.core.token_statistics import TypeMetrics
from internlm.core.trainer import Trainer
from internlm.data.batch_plan import parse_skip_batches
from internlm.data.loader import TrainLoader, build_train_loader
from internlm.data.packing import Packing
from internlm.data.valid import ValidLoader, build_valid_loaders
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.flops import flops_per_token, peak_flops
from internlm.eval.hook import EvaluationHook
from internlm.initialize.activation_memory import check_activations
from internlm.initialize.data_checks import check_valid_sets
from internlm.initialize.model_changes import check_same_function, compare_configs, saved_config
from internlm.initialize.stages import (
    build_chunks,
    build_layer_split,
    build_meta_model,
    build_pipeline_schedule,
    parameter_groups,
    reduce_dtype,
    state_form,
)
from internlm.initialize.tokenizers import compare_with_checkpoint, data_tokenizer
from internlm.initialize.user_hooks import build_user_hooks, check_names
from internlm.model.architecture import Architecture
from internlm.model.ops.cpu.gemm import choose_cpu_gemm
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.monitor.console import ConsoleHook
from internlm.monitor.garbage_collection import GarbageCollectionHook
from internlm.monitor.health import HealthHook
from internlm.monitor.metrics_collector import MetricsCollector
from internlm.monitor.metrics_file import MetricsFileHook
from internlm.monitor.profiler import ProfilerHook
from internlm.monitor.tensorboard import TensorBoardHook
from internlm.monitor.throughput import FlopsModel, Throughput
from internlm.solver.beta2_scheduler import Beta2Schedule
from internlm.solver.grad_scaler import ConstantGradScaler, DynamicGradScaler, GradScaler
from internlm.solver.lr_scheduler import LearningRateSchedule
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.nonfinite import describe_failed_update, nonfinite_states, nonfinite_weights
from internlm.solver.optimizer.rules.adamw import AdamW
from internlm.utils.allocator import keep_freed_memory
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.paths import expand_home
from internlm.utils.storage import StoragePath, storage_path

logger = get_logger(__name__)


def build_layout(config: Config, world_size: int) -> ParallelLayout:
    """The rank layout that the `parallel` section asks for."""
    parallel = config.parallel
    tensor, num_kv_heads = parallel.tensor, config.model.num_kv_heads
    has_copies = tensor.mode != "isp" and tensor.size > num_kv_heads
    return ParallelLayout(
        world_size=world_size,
        pipeline=parallel.pipeline.size,
        tensor=tensor.size,
        weight=parallel.weight.size,
        zero=parallel.zero1.size,
        mode=tensor.mode,
        kv_replicas=tensor.size // num_kv_heads if has_copies else 1,
    )


def check_buildable(config: Config, world_size: int) -> None:
    """Find every mistake of a config before any rank is connected, also those that only building shows (sizes of
    layers, phases of schedules).

    Raises:
        ConfigError: there is one.
    """
    check_config(config, world_size)
    refused = [mistake.text for mistake in find_refused_in_training(config)]
    if refused:
        raise ConfigError(refused)
    layout = build_layout(config, world_size)
    placement = build_pipeline_schedule(config)(config.data.micro_num).placement
    check_activations(config, build_meta_model(config), layout, placement, build_layer_split(config))
    build_schedules(config)
    parse_skip_batches(config.data.skip_batches)
    if config.ckpt.enable_internevo2hf_ckpt:
        check_exportable(config)


def build_schedules(config: Config) -> tuple[LearningRateSchedule, Beta2Schedule]:
    """Learning rate and second AdamW coefficient by step."""
    lr, beta2 = config.lr_scheduler, config.beta2_scheduler
    return (
        LearningRateSchedule(
            shape=lr.type,
            base_lr=config.adam.lr,
            total_steps=lr.total_steps,
            init_steps=lr.init_steps,
            warmup_ratio=lr.warmup_ratio,
            eta_min=lr.eta_min,
            decay_ratio=lr.decay_ratio,
            last_epoch=lr.last_epoch,
        ),
        Beta2Schedule(beta2.init_beta2, beta2.c, beta2.cur_iter),
    )


def set_numerics(config: Config) -> None:
    """Set torch's process-wide switches for matrix products as the config says; on CPU also those of memory."""
    torch.backends.cuda.matmul.allow_tf32 = config.model.uses_tf32
    torch.backends.cudnn.allow_tf32 = config.model.uses_tf32
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.backends.cudnn.deterministic = config.cudnn_deterministic
    choose_cpu_gemm(config.model.cpu_gemm)
    if not torch.cuda.is_available():
        keep_freed_memory()


def build_trainer(
    config: Config,
    context: ParallelContext,
    run_dir: Path,
    *,
    config_text: str = "",
    profiling: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
) -> Trainer:
    """Everything that a run needs, ready for `fit()`, with a checkpoint loaded as `ckpt` asks.

    Args:
        config: from `load_config`.
        context: where this rank stands; its layout must be `build_layout(config, world_size)`.
        run_dir: where metrics and traces go.
        config_text: source of the config file, kept with every checkpoint.
        profiling: record a profile of an early step.
        resume: False builds the trainer without loading anything.
        progress: where the loop marks what it is doing.

    Raises:
        ConfigError, DataError, CheckpointError: a mistake in what the user gave.
    """
    if config.hybrid_zero_optimizer.offload_optimizer and context.device.type == "cpu":
        logger.warning("hybrid_zero_optimizer.offload_optimizer saves no memory here: the device is the host")
    known = data_tokenizer(config)
    train_loader = build_loader(config, context)
    check_valid_sets(config, context)
    chunks = build_chunks(config, context)
    engine = build_engine(config, context, chunks, train_loader.type_names, progress)
    manager = build_manager(config, config_text)
    if known is not None:
        manager.files[DATA_TOKENIZER] = known.to_json()
    lr, beta2 = build_schedules(config)
    trainer = Trainer(
        engine,
        train_loader,
        total_steps=config.data.total_steps,
        lr=lr.lr,
        schedules={"beta2": beta2.beta2},
        advance=config.lr_scheduler.advance,
        hooks=build_hooks(config, context, run_dir, engine, train_loader, profiling=profiling),
        run_dir=run_dir,
        valid_sets=build_valid_sets(config, context),
        checkpointer=manager if config.ckpt.enable_save_ckpt else None,
        is_skipped=parse_skip_batches(config.data.skip_batches).contains,
    )
    if resume:
        load_checkpoint(config, manager, trainer)
    if config.ckpt.enable_save_ckpt:
        first, last = trainer.state.step + 1, trainer.total_steps
        manager.check_room(context, first, last, snapshots=config.ckpt.oss_snapshot_freq is not None)
        # After the mistakes that loading finds: they leave no folders behind.
        manager.check_writable(context)
    return trainer


def build_loader(config: Config, context: ParallelContext) -> TrainLoader:
    """The training data of this data rank."""
    data = config.data
    return build_train_loader(
        data.train_folder,
        seq_len=data.seq_len,
        micro_bsz=data.micro_bsz,
        micro_num=data.micro_num,
        packing=packing(config),
        seed=data.seed,
        vocab_size=config.model.vocab_size,
        data_rank=context.index("data"),
        data_size=context.size("data"),
        num_workers=data.num_worker,
        min_length=data.min_length,
        min_length_dict=data.min_length_dict,
        rampup_batch_size=data.rampup_batch_size,
        skip_batches=data.skip_batches,
        skip_bad_documents=data.skip_bad_documents,
        fixed_random_dataset_seqlen=data.fixed_random_dataset_seqlen,
        total_steps=data.total_steps,
        pin_memory=context.device.type == "cuda",
    )


def packing(config: Config) -> Packing:
    """Which of the three ways makes samples from documents."""
    if not config.data.use_packed_dataset:
        return "unpacked"
    return "pack_sample_into_one" if config.data.pack_sample_into_one else "cut"


def build_valid_sets(config: Config, context: ParallelContext) -> dict[str, ValidLoader]:
    """This data rank's part of every valid set; none when evaluation is off."""
    data = config.data
    if data.valid_every == 0:
        return {}
    return build_valid_loaders(
        data.valid_folder,
        seq_len=data.seq_len,
        micro_bsz=data.micro_bsz,
        vocab_size=config.model.vocab_size,
        valid_micro_num=data.valid_micro_num,
        data_rank=context.index("data"),
        data_size=context.size("data"),
        packed=data.use_packed_dataset,
    )


def build_engine(
    config: Config,
    context: ParallelContext,
    chunks: list[nn.Module],
    type_names: list[str],
    progress: Progress | None = None,
) -> Engine:
    """Optimizer, loss and schedule around this rank's chunks of a model."""
    zero, adam = config.hybrid_zero_optimizer, config.adam
    optimizer = HybridZeroOptimizer(
        chunks,
        context,
        build_scaler(config, context.device),
        rule=AdamW((adam.adam_beta1, adam.adam_beta2), adam.adam_eps),
        weight_decay=adam.weight_decay,
        weight_decay_norms_and_biases=adam.weight_decay_norms_and_biases,
        groups=parameter_groups(config),
        clip_grad_norm=zero.clip_grad_norm,
        overlap_sync_grad=zero.overlap_sync_grad,
        overlap_sync_param=zero.overlap_sync_param,
        reduce_bucket_size=zero.reduce_bucket_size,
        reduce_dtype=reduce_dtype(config),
        form=state_form(config),
    )
    loss = partial(
        linear_cross_entropy,
        label_smoothing=config.loss.label_smoothing,
        z_loss_coeff=config.loss.z_loss_coeff,
        with_accuracy=True,
        compiled=config.model.compile,
    )
    statistics = TypeMetrics(type_names, context.device)
    return Engine(chunks, optimizer, context, loss, statistics, build_pipeline_schedule(config), progress)


def build_scaler(config: Config, device: torch.device) -> GradScaler:
    """A dynamic loss scale for fp16; bf16 and fp32 need none."""
    if config.model.torch_dtype != torch.float16:
        return ConstantGradScaler(device)
    scaler = config.grad_scaler
    min_scale, max_scale = scaler.scale_bounds
    return DynamicGradScaler(
        initial_scale=scaler.fp16.initial_scale,
        min_scale=min_scale,
        max_scale=max_scale,
        growth_factor=scaler.growth_factor,
        backoff_factor=scaler.backoff_factor,
        growth_interval=scaler.fp16.growth_interval,
        hysteresis=scaler.hysteresis,
        device=device,
    )


def build_hooks(
    config: Config,
    context: ParallelContext,
    run_dir: Path,
    engine: Engine,
    train_loader: TrainLoader,
    *,
    profiling: bool = False,
) -> list[Hook]:
    """The hooks of the loop, in the order in which they are called; those of the config come last."""
    collector = MetricsCollector(Throughput(context.world_size, build_flops(config, context.device, engine.chunks[0])))
    hooks: list[Hook] = [GarbageCollectionHook(config.data.empty_cache_and_diag_interval)]
    hooks.append(ConsoleHook(collector, config.monitor.log_every, config.monitor.log_format))
    if config.monitor.metrics_file:
        hooks.append(MetricsFileHook(collector))
    if config.enable_tb:
        # The variables' names are InternEvo's.
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
    # Behind the checkpoint: what an evaluation meets must not cost the steps before it.
    if config.data.valid_every > 0 and config.data.valid_folder is not None:
        hooks.append(EvaluationHook(config.data.valid_every))
    if config.ckpt.stop_file_path is not None:
        hooks.append(StopFileHook(Path(config.ckpt.stop_file_path.removeprefix("local:"))))
    hooks.append(build_health(config, collector, engine, train_loader))
    own = build_user_hooks(config.hooks)
    check_names(hooks, own)
    return [*hooks, *own]


def build_health(config: Config, collector: MetricsCollector, engine: Engine, train_loader: TrainLoader) -> HealthHook:
    """What ends a run that no longer learns."""
    optimizer = engine.optimizer
    data, scaler = config.data, config.grad_scaler
    can_fall = config.model.torch_dtype == torch.float16 and scaler.backoff_factor < 1
    reasons = "every token is masked (negative in the .bin)"
    if not data.use_packed_dataset:
        reasons += f", or every prompt is longer than data.seq_len = {data.seq_len}, where documents are cut off"
    return HealthHook(
        collector,
        max_skipped=config.monitor.max_skipped_updates,
        smallest_scale=scaler.scale_bounds[0] if can_fall else math.inf,
        find_cause=partial(describe_failed_update, optimizer),
        samples_per_epoch=train_loader.num_samples_per_epoch,
        why_no_label=f"The likely reason: {reasons}; see doc/data.md",
    )


def build_flops(config: Config, device: torch.device, model: nn.Module) -> FlopsModel | None:
    """FLOPs a token for tflops and mfu; None for a user's own model, whose shape is not known."""
    architecture = getattr(model, "architecture", None)
    if not isinstance(architecture, Architecture):
        return None
    dimensions = ModelDimensions.of(architecture)
    if config.monitor.peak_tflops is not None:
        peak: float | None = config.monitor.peak_tflops * 1e12
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(name, architecture.dtype)
    seq_len = config.data.seq_len
    return FlopsModel(
        flops_per_token(dimensions, seq_len, "full"), flops_per_token(dimensions, seq_len, "causal"), peak
    )


def build_manager(config: Config, config_text: str) -> CheckpointManager:
    """What saves and loads checkpoints, as the `ckpt` section asks."""
    ckpt = config.ckpt
    return CheckpointManager(
        ckpt.save_ckpt_folder or None,
        files={CONFIG_FILE: json.dumps(config.model_dump(mode="json"), indent=1), "config_file.py": config_text},
        snapshot_folder=ckpt.snapshot_ckpt_folder or None,
        keep_latest=ckpt.keep_latest,
        async_save=ckpt.enable_save_ckpt and ckpt.saves_in_background,
        after_save=export_beside if ckpt.enable_internevo2hf_ckpt else None,
    )


def _keep_files(config: Config, manager: CheckpointManager, path: StoragePath) -> None:
    """Files of the checkpoint at `path` that those of this run are to have, too."""
    content = manager.files.get(DATA_TOKENIZER)
    known = None if content is None else KnownTokenizer.from_json(content)
    manager.files |= compare_with_checkpoint(config, path, known)


def is_left_open(info: LoadCkptInfo) -> bool:
    """Whether its path is a placeholder of an example. A folder of such a name counts; a store is not asked for one."""
    assert info.path is not None
    path = storage_path(info.path)
    return info.is_placeholder and not (path.is_local and path.exists())


def check_checkpoint(config: Config, path: StoragePath, mark: Manifest, contents: Collection[str]) -> None:
    """Compare the config with that of a checkpoint of ours from which `contents` are to be loaded.

    Raises:
        CheckpointError: the model is another function.
    """
    saved = saved_config(path)
    if saved is not None:
        next_rate = (lambda one: build_schedules(one)[0].lr(mark.step)) if "scheduler" in contents else None
        compare_configs(saved, config, f"the checkpoint '{path}'", contents, next_rate)


def check_foreign_weights(config: Config, info: LoadCkptInfo, path: StoragePath) -> None:
    """The same for weights of others, as far as their config is known.

    Raises:
        CheckpointError: the model is another function.
    """
    trained = trained_as(info.ckpt_type, path, config)
    if trained is not None:
        check_same_function(trained, config, f"'{path}'", translated=True)


def load_checkpoint(config: Config, manager: CheckpointManager, trainer: Trainer) -> None:
    """Resume, or load `load_ckpt_info`, or start from scratch, and say which.

    Raises:
        CheckpointError: a checkpoint is missing, damaged, or does not fit; or its model is another function.
    """
    info = config.ckpt.load_ckpt_info
    check = partial(check_checkpoint, config)
    # A run does not go on from a folder that it would not save to.
    resumes = config.ckpt.auto_resume and config.ckpt.enable_save_ckpt
    found = manager.resume(trainer, check) if resumes else None
    if found is not None:
        _keep_files(config, manager, found.path)
        logger.info("resuming at step %d of %d from %s", trainer.state.step, trainer.total_steps, found.path)
        check_finite(trainer, found.path)
    elif info is not None and info.path is not None and not is_left_open(info):
        path = storage_path(info.path)
        if info.ckpt_type == "internevo":
            path = resolve(path)
        _keep_files(config, manager, path)
        if info.ckpt_type == "internevo":
            manager.load(trainer, path, info.content, strict=info.strict, check=check)
        else:
            weights = open_weights(info.ckpt_type, path, trainer.engine.chunks[0])
            check_foreign_weights(config, info, path)
            load_weights(trainer, weights, f"'{path}'", strict=info.strict)
            trainer.notify_checkpoint_loaded(path)
        logger.info("starting at step %d with %s loaded from %s", trainer.state.step, ", ".join(info.content), path)
        check_finite(trainer, path)
    else:
        off = "enable_save_ckpt" if config.ckpt.auto_resume else "auto_resume"
        why = f"no complete checkpoint in {manager.save_folder}" if resumes else f"{off} is off"
        logger.info("starting from scratch (%s)", why)
    if config.ckpt.enable_save_ckpt:
        manager.warn_of_later(trainer.context, trainer.state.step)


def check_finite(trainer: Trainer, path: StoragePath) -> None:
    """Refuse what was loaded if it holds an inf or a NaN, which training would only spread; collective.

    Raises:
        CheckpointError: it does; names the first tensor, its layer and rank.
    """
    optimizer = trainer.engine.optimizer
    found = nonfinite_weights(optimizer) or nonfinite_states(optimizer)
    if found:
        raise CheckpointError(
            f"the checkpoint '{path}' has an inf or NaN in {found[0]}"
            + (f" and in {len(found) - 1} more tensors" if len(found) > 1 else "")
            + ": training cannot go on from there. Name an earlier one in ckpt.load_ckpt_info, or remove this one"
        )
