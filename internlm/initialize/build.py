"""Wires a config into a Trainer. Everything below this package takes plain arguments."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

from internlm.checkpoint.data_tokenizer import DATA_TOKENIZER
from internlm.config.loader import check_config
from internlm.config.rules import expert_inner_ranks, expert_ranks
from internlm.config.schema import Config
from internlm.config.unsupported import find_refused_in_training
from internlm.convert.to_hf import check_exportable
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.engine import Engine
from internlm.core.progress.record import Progress
from internlm.core.token_statistics import TypeMetrics
from internlm.core.trainer import Trainer
from internlm.data.loaders.batch_plan import parse_skip_batches
from internlm.initialize.activation_memory import check_activations
from internlm.initialize.build_data import build_loader, build_valid_sets
from internlm.initialize.build_hooks import build_hooks
from internlm.initialize.build_schedules import build_schedules
from internlm.initialize.data_checks import check_valid_sets
from internlm.initialize.label_bytes import label_bytes
from internlm.initialize.load_checkpoint import build_manager, load_checkpoint
from internlm.initialize.multiple_choice import build_multiple_choice
from internlm.initialize.stages import (
    build_chunks,
    build_layer_split,
    build_meta_model,
    build_pipeline_schedule,
    parameter_groups,
    reduce_dtype,
    state_form,
)
from internlm.initialize.tokenizers import data_tokenizer
from internlm.model.moe.balance import BiasRule
from internlm.model.moe.router import RouterLosses
from internlm.model.ops.cpu.gemm import choose_cpu_gemm
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.solver.grad_scaler import ConstantGradScaler, DynamicGradScaler, GradScaler
from internlm.solver.optimizer.hybrid_zero import HybridZeroOptimizer
from internlm.solver.optimizer.rules.adamw import AdamW
from internlm.utils.allocator import keep_freed_memory
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def build_layout(config: Config, world_size: int) -> ParallelLayout:
    """The rank layout described by the `parallel` section."""
    parallel = config.parallel
    tensor, num_kv_heads = parallel.tensor_ranks, config.model.num_kv_heads
    is_isp, two = parallel.tensor.mode == "isp", parallel.sequence_2D
    return ParallelLayout(
        world_size=world_size,
        pipeline=parallel.pipeline.size,
        tensor=tensor,
        context=parallel.context_ranks,
        weight=parallel.weight.size,
        zero=parallel.zero1.size,
        mode=parallel.tensor.mode,
        head_first=two.device_placement_strategy.head_first if two.enable else True,
        expert=expert_ranks(config, world_size),
        expert_inner=expert_inner_ranks(config),
        expert_zero=parallel.expert_zero1.size,
        kv_replicas=1 if is_isp else max(1, tensor // num_kv_heads),
    )


def check_buildable(config: Config, world_size: int) -> None:
    """Check a config before any rank connects, including the construction of its parts (layers, schedules).

    Raises:
        ConfigError: the config has problems; all of them are listed.
    """
    check_config(config, world_size)
    refused = [problem.text for problem in find_refused_in_training(config)]
    if refused:
        raise ConfigError(refused)
    layout = build_layout(config, world_size)
    placement = build_pipeline_schedule(config)(config.data.micro_num).placement
    check_activations(config, build_meta_model(config), layout, placement, build_layer_split(config))
    build_schedules(config)
    parse_skip_batches(config.data.skip_batches)
    if config.ckpt.enable_internevo2hf_ckpt:
        check_exportable(config)


def set_numerics(config: Config) -> None:
    """Set torch's process-wide GEMM flags from the config; on a CPU also the allocator's."""
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
    """Build a trainer that is ready for `fit()`, with the checkpoint of the `ckpt` section loaded.

    Args:
        config: from `load_config`.
        context: of this rank; its layout must be `build_layout(config, world_size)`.
        run_dir: folder for metrics and traces.
        config_text: source of the config file, stored in every checkpoint.
        profiling: record a profile of an early step.
        resume: False builds the trainer without loading a checkpoint.
        progress: receives the loop's current step and activity.

    Raises:
        ConfigError, DataError, CheckpointError: a user error.
    """
    if config.hybrid_zero_optimizer.offload_optimizer and context.device.type == "cpu":
        logger.warning("hybrid_zero_optimizer.offload_optimizer saves no memory: the device is the host")
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
        scored_sets=build_multiple_choice(config),
        label_bytes=label_bytes(config, context),
        evaluates_by_position=config.data.valid_by_position,
        counts_bad_documents=config.data.on_bad_data == "skip",
        checkpointer=manager if config.ckpt.enable_save_ckpt else None,
        is_skipped=parse_skip_batches(config.data.skip_batches).contains,
    )
    if resume:
        load_checkpoint(config, manager, trainer)
    if config.ckpt.enable_save_ckpt:
        first, last = trainer.state.step + 1, trainer.total_steps
        manager.check_room(context, first, last, snapshots=config.ckpt.oss_snapshot_freq is not None)
        # Creates folders, so it comes after loading: a user error found there leaves none behind.
        manager.check_writable(context)
    return trainer


def build_engine(
    config: Config,
    context: ParallelContext,
    chunks: list[nn.Module],
    type_names: list[str],
    progress: Progress | None = None,
) -> Engine:
    """Combine this rank's model chunks with optimizer, loss and pipeline schedule."""
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
        softcap=getattr(chunks[0], "logit_softcap", None),
        with_accuracy=True,
        compiled=config.model.compile,
    )
    statistics = TypeMetrics(type_names, context.device)
    router_losses = RouterLosses(
        balance=config.loss.moe_loss_coeff,
        z=config.loss.moe_z_loss_coeff,
        sequence=config.loss.moe_sequence_loss_coeff,
    )
    bias_rule = BiasRule(config.loss.moe_bias_update_rate, config.loss.moe_bias_centered)
    schedule = build_pipeline_schedule(config)
    return Engine(
        chunks,
        optimizer,
        context,
        loss,
        statistics,
        schedule,
        progress,
        router_losses,
        bias_rule,
        config.seed,
        multi_token_coeff=config.loss.multi_token_loss_coeff,
    )


def build_scaler(config: Config, device: torch.device) -> GradScaler:
    """A dynamic loss scale for fp16, a constant one of 1 for bf16 and fp32."""
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
