"""The replacements of InternEvo's modules and names: the table behind `former_names` and doc/from_internevo.md."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = "doc/from_internevo.md"


@dataclass(frozen=True)
class Former:
    """The replacement of a name of InternEvo.

    Attributes:
        new: dotted path of its replacement; None when there is none.
        note: how to use the replacement, or what to do instead, as one sentence without a full stop.
    """

    new: str | None
    note: str

    def text(self) -> str:
        """The replacement in one line."""
        return self.note if self.new is None else f"{self.new} ({self.note})"


def _now(new: str, note: str) -> Former:
    return Former(f"internlm.{new}", note)


def _gone(note: str) -> Former:
    return Former(None, note)


_CONTEXT = _now(
    "core.context.parallel_context.ParallelContext",
    "there is no global context: `context = ParallelContext.create(layout)` is passed as an argument; "
    "context.size('tensor'), .index('data'), .group('pipeline'), .rank, .world_size, .is_main_rank",
)
_MODE = _now(
    "core.context.rank_view.RankView",
    "axes are words: 'data', 'tensor', 'pipeline', 'weight' ..., as in context.size('data')",
)
_ATTRIBUTE = _now(
    "core.parallel.shard_spec.ShardSpec", "the axes over which a parameter is sharded and its gradient is summed"
)
_CONFIG = _now("config.schema.Config", "typed and frozen; load_config returns one; read config.model.hidden_size")
_LAUNCH = _now(
    "initialize.launch.detect_launch",
    "launch = detect_launch(); device = choose_device(launch); connect(launch, device); the config is load_config's",
)
_PARSER = _now("commands.train.add_arguments", "the options of `internlm train`")
_SANITY = _now("config.loader.check_config", "load_config checks, and reports every problem at once")
_TRAINER = _now("initialize.build.build_trainer", "trainer = build_trainer(config, context, run_dir); trainer.fit()")
_MODEL = _now("model.registry.build_model", "under torch.device('meta'), then parallelize(model, context, seed=...)")
_OPTIMIZER = _now(
    "solver.optimizer.hybrid_zero.HybridZeroOptimizer", "HybridZeroOptimizer(model, context, weight_decay=...)"
)
_TRAIN_DATA = _now(
    "data.loaders.train_loader.build_train_loader", "initialize.build_data.build_loader(config, context) calls it"
)
_VALID_DATA = _now(
    "data.loaders.valid_loader.build_valid_loaders", "initialize.build_data.build_valid_sets(config, context) calls it"
)
_STATE = _now("core.hooks.TrainState", "trainer.state: step, num_consumed_samples, num_consumed_tokens")
_LOSS = _now(
    "model.ops.cross_entropy.linear_cross_entropy", "takes hidden states and the head weight; returns a sum over tokens"
)
_ACCURACY = _now("core.token_statistics.TypeMetrics", "loss and accuracy by data type; perplexity is exp of the loss")
_STEP = _now("core.engine.Engine", "engine.train_step(batch, lr) runs forward, backward and the update of one batch")
_HOOK = _now("core.hooks.Hook", "the protocol of hooks; Trainer(..., hooks=[...])")
_NUMBERS = _now(
    "monitor.metrics_collector.MetricsCollector",
    "the numbers of a step, which console, metrics.jsonl and TensorBoard show",
)
_LOGGER = _now("utils.logging.get_logger", "a logging.Logger; configure_logging adds the run's file")
_MANAGER = _now("checkpoint.manager.CheckpointManager", "save(trainer), resume(trainer), load(trainer, path, content)")
_LOAD_TYPE = _now(
    "convert.checkpoint_types.register_checkpoint_type", "decorates a function from a path to a WeightSource"
)
_LOAD_FUNCTION = _now("convert.checkpoint_types.open_weights", "reads ckpt_type 'hf' and 'llama'")
_STORAGE = _now(
    "utils.storage.storage_path", "storage_path(url) has open_read, open_write, names, exists ... on any storage"
)
_ALERT = _gone("alerts are not supported yet; a failed run ends non-zero, with the cause on every rank")
_EVALUATE = _now("eval.hook.EvaluationHook", "data.valid_every and valid_folder enable it")
_SKIP = _now("data.loaders.batch_plan.parse_skip_batches", "data.skip_batches in the config")
_FLOPS = _now("estimate.flops.flops_per_token", "tflops and mfu count model FLOPs; hfu adds recomputation")
_DEVICE = _now("initialize.launch.choose_device", "a torch.device, which the context holds: context.device")
_SEED = _now("core.context.random.seed_everything", "one seed per process; there is no dropout and no state by mode")
_COLLECT = _now("monitor.garbage_collection.GarbageCollectionHook", "data.empty_cache_and_diag_interval in the config")
_TIMER = _gone("times are in the metrics of a step (fwd_bwd_time ...); the flag --profiling shows each kernel")
_GENERATE = _now(
    "apis.sequence_generator.SequenceGenerator", "same arguments; or `internlm generate` on a command line"
)
_REGISTRY = _now("model.registry.register_model", "a decorator: @register_model('NAME')")
_LR = _now("solver.lr_scheduler.LearningRateSchedule", "a function of the step: schedule.lr(step)")
_BETA2 = _now("solver.beta2_scheduler.Beta2Schedule", "a function of the step: schedule.beta2(step)")
_SCALER = _now("solver.grad_scaler.DynamicGradScaler", "for fp16; bf16 and fp32 need none")
_PIPELINE = _now(
    "core.scheduler.schedules.make_schedule", "make_schedule('1F1B', ...); one executor runs every schedule"
)
_LINEAR = _now(
    "model.modules.linear.Linear", "models are written for one device; parallelize(model, context) shards them"
)
_PARALLELIZE = _now("core.parallel.parallelize.parallelize", "shards a model that is written for one device")
_ISP = _now("core.parallel.modes.isp.Isp", "parallel.tensor.mode = 'isp' in the config chooses it")
_MOE = _now("model.moe.feed_forward.MoeFeedForward", "built from model.num_experts in the config; see doc/moe.md")
_IS_MOE = _gone("shard_spec_of(parameter).view is 'expert' for weights of experts on several ranks")
_FSDP = _now("core.parallel.fsdp.apply_fsdp", "parallel.fsdp in the config")
_PROFILER = _now("monitor.profiler.ProfilerHook", "the flag --profiling of train.py")
_WRITER = _now("monitor.tensorboard.TensorBoardHook", "enable_tb in the config; metrics.jsonl has the same numbers")
_AMP = _gone("parameters have model.dtype, and the optimizer has fp32 masters: no wrapper is needed")
_NORM = _now("model.modules.norm.RMSNorm", "and LayerNorm beside it; the kernel is chosen by the device")
_NO_ACCELERATOR = _now(
    "initialize.launch.choose_device", "CPU or CUDA, whichever the machine has; `internlm doctor` shows it"
)

NAMES: dict[str, dict[str, Former]] = {
    "internlm": {"initialize_trainer": _TRAINER, "launch": _LAUNCH, "get_default_parser": _PARSER}
    | dict.fromkeys(("initialize_distributed_env", "launch_from_slurm", "launch_from_torch"), _LAUNCH),
    "internlm.accelerator": dict.fromkeys(
        ("get_accelerator", "internlm_accelerator", "AcceleratorType"), _NO_ACCELERATOR
    ),
    "internlm.apis.inference": {
        "SequenceGenerator": _GENERATE,
        "batch_tokenize": _gone("generate takes prompts of any lengths, without padding"),
    },
    "internlm.apis.inference_utils": {
        "InferenceParams": _now("model.modules.cache.KeyValueCache", "generate creates it")
    },
    "internlm.checkpoint": {"CheckpointManager": _MANAGER},
    "internlm.checkpoint.checkpoint_manager": {
        "CheckpointManager": _MANAGER,
        "CheckpointLoadMethod": _LOAD_TYPE,
        "CheckpointLoadContent": _now("checkpoint.manifest.WHOLE_RUN", "words: model, optimizer, scheduler, sampler"),
        "CheckpointSaveType": _gone("a checkpoint, or a snapshot: CheckpointManager.save(trainer, snapshot=True)"),
    },
    "internlm.checkpoint.components": dict.fromkeys(
        (
            "load_model_checkpoint",
            "save_model_checkpoint",
            "load_optimizer_checkpoint",
            "save_optimizer_checkpoint",
            "load_sampler",
            "load_context",
            "load_scheduler",
        ),
        _MANAGER,
    ),
    "internlm.checkpoint.load_funcs": {
        "LOAD_FUNC_DICT": _LOAD_TYPE,
        "merge_pp_within_tp": _now("convert.from_internevo.import_internevo", "reads any layout"),
    }
    | dict.fromkeys(("load_llama_pretrained_weights", "load_hf_llama_pretrained_weights"), _LOAD_FUNCTION),
    "internlm.core.context": {"global_context": _CONTEXT, "ParallelMode": _MODE, "Config": _CONFIG}
    | {
        "ParallelContext": _CONTEXT,
        "ProcessGroupInitializer": _now("core.context.layout.ParallelLayout", "sizes, and the views of the ranks"),
    }
    | dict.fromkeys(
        (
            "IS_REPLICA_ZERO_PARALLEL",
            "IS_TENSOR_ZERO_PARALLEL",
            "IS_TENSOR_DATA_PARALLEL",
            "IS_WEIGHT_ZERO_PARALLEL",
            "IS_TENSOR_EXPERT_DATA_PARALLEL",
            "IS_WEIGHT_EXPERT_DATA_PARALLEL",
        ),
        _ATTRIBUTE,
    )
    | dict.fromkeys(
        (
            "seed",
            "set_mode",
            "add_seed",
            "get_seeds",
            "get_states",
            "get_current_mode",
            "set_seed_states",
            "sync_states",
        ),
        _SEED,
    ),
    "internlm.core.context.parallel_context": {"global_context": _CONTEXT, "Config": _CONFIG}
    | dict.fromkeys(("IS_REPLICA_ZERO_PARALLEL", "IS_TENSOR_ZERO_PARALLEL", "IS_WEIGHT_ZERO_PARALLEL"), _ATTRIBUTE),
    "internlm.core.context.process_group_initializer": {"ParallelMode": _MODE},
    "internlm.core.context.random": dict.fromkeys(("seed", "set_mode", "get_current_mode", "add_seed"), _SEED),
    "internlm.core.communication.isp": dict.fromkeys(("ISPCommunicator", "ISPCommunicatorSchedulerHook"), _ISP),
    "internlm.core.communication.utils": {"ParamAsyncBcastHandler": _OPTIMIZER},
    "internlm.core.fsdp": {"wrap_FSDP_model": _FSDP},
    "internlm.core.gradient_handler": {
        "PipelineSharedModuleGradientHandler": _gone("gradients of tied weights are always summed over their stages")
    },
    "internlm.core.model": {"create_model": _MODEL},
    "internlm.core.naive_amp": dict.fromkeys(("NaiveAMPModel", "set_fp32_attr_to_module", "unwrap_naive_amp"), _AMP),
    "internlm.core.parallel.comm": dict.fromkeys(("ISPCommunicatorSchedulerHook", "ISPCommunicator"), _ISP),
    "internlm.core.parallel.shard": {
        "pipeline_parallel_sharding_wrapper": _now(
            "core.parallel.pipeline_stages.build_stages", "the chunks of this rank's stage"
        ),
        "partition_uniform": _now("core.parallel.pipeline_stages.split_layers", "the layers of each stage"),
    },
    "internlm.core.scheduler": {"SchedulerHook": _HOOK, "SchedulerMetricHook": _ACCURACY}
    | dict.fromkeys(
        ("NonPipelineScheduler", "PipelineScheduler", "InterleavedPipelineScheduler", "BaseScheduler"), _PIPELINE
    ),
    "internlm.core.trainer_builder": {"TrainerBuilder": _TRAINER},
    "internlm.core.trainstate": {"TrainState": _STATE},
    "internlm.data": {
        "build_train_loader_with_data_type": _TRAIN_DATA,
        "build_valid_loader_with_data_type": _VALID_DATA,
        "build_generation_loader_with_data_type": _gone("`internlm generate` reads prompts from JSON lines"),
    },
    "internlm.data.build_dataloader": {
        "build_train_loader_with_data_type": _TRAIN_DATA,
        "build_valid_loader_with_data_type": _VALID_DATA,
    },
    "internlm.data.train_state": {"get_train_state": _STATE},
    "internlm.data.utils": {
        "DATASET_TYPE_IDS_MAP": _now(
            "data.documents.folders.find_train_files", "types are the folders below train_folder"
        ),
        "get_dataset_type_ids_map": _now(
            "data.documents.folders.find_train_files", "types are the folders below train_folder"
        ),
        "unpack_data": _now("data.packing.collate.to_micro_batch", "a micro-batch is built packed, or in rows"),
        "packed_data_normalizer": _now("data.packing.collate.to_micro_batch", "lengths are counted in the loader"),
    },
    "internlm.data.collaters": {
        "packed_collate_fn": _now("data.packing.collate.to_micro_batch", "batches are Batch objects")
    },
    "internlm.data.tokenized": dict.fromkeys(
        ("StaticBatchSampler", "get_dpsampler_dataloader"),
        _now("data.sources.sample_order.sample_order", "the order is a function of seed and index"),
    ),
    "internlm.data.tokenized.packed_dataset": {
        "PackedDataset": _now("data.sources.document_source.DocumentSource", "packs documents of a folder")
    },
    "internlm.data.tokenized.json_dataset": {
        "JsonlDataset": _now("data.tokenized_files.reader.TokenizedFile", "one .bin file")
    },
    "internlm.data.tokenized.dummy_dataset": {
        "RandomDataset": _now("data.sources.dummy.DummySource", "train_folder = None")
    },
    "internlm.data.streaming": {
        "StreamingDataset": _now("data.sources.row_stream.RowStream", "data.type = 'streaming'")
    },
    "internlm.eval.evaluation": {"evaluate_on_val_dls": _EVALUATE, "switch_evaluation_mode": _EVALUATE},
    "internlm.initialize": {
        "initialize_trainer": _TRAINER,
        "get_default_parser": _PARSER,
        "try_bind_numa": _gone("ranks are not bound to NUMA nodes: use numactl or torchrun's --numa-binding"),
    }
    | dict.fromkeys(("initialize_distributed_env", "launch_from_slurm", "launch_from_torch"), _LAUNCH),
    "internlm.initialize.launch": {
        "get_default_parser": _PARSER,
        "args_sanity_check": _SANITY,
        "get_config_value": _CONFIG,
    }
    | dict.fromkeys(("initialize_distributed_env", "launch", "launch_from_slurm", "launch_from_torch"), _LAUNCH),
    "internlm.initialize.initialize_launcher": {"initialize_launcher": _LAUNCH},
    "internlm.initialize.initialize_model": {"initialize_model": _MODEL},
    "internlm.initialize.initialize_optimizer": {"initialize_optimizer": _OPTIMIZER},
    "internlm.initialize.initialize_trainer": {"initialize_trainer": _TRAINER},
    "internlm.launcher.launch": {
        "main": _now("commands.train.run", "`torchrun ... train.py --config X` or `internlm train`")
    },
    "internlm.model.base_model": {"BaseModel": _now("model.decoder.Decoder", "one class for every dense family")},
    "internlm.model.builder": {"create_model": _MODEL},
    "internlm.model.loss": {"FlashGPTLMLoss": _LOSS},
    "internlm.model.losses": {"FlashGPTLMLoss": _LOSS, "InternLoss": _LOSS},
    "internlm.model.losses.ce_loss": {"FlashGPTLMLoss": _LOSS, "InternLoss": _LOSS},
    "internlm.model.metrics": {"AccPerplex": _ACCURACY, "SchedulerMetricHook": _ACCURACY, "LossWithTypeId": _ACCURACY},
    "internlm.model.modeling_internlm": {
        "PackedFlashInternLm1D": _now("model.families.internlm", "model_type = 'INTERNLM'")
    },
    "internlm.model.modeling_internlm2": {"InternLM2": _now("model.families.internlm2", "model_type = 'INTERNLM2'")},
    "internlm.model.modeling_llama": {"Llama2": _now("model.families.llama", "model_type = 'LLAMA2'")},
    "internlm.model.modules.embedding": {
        "Embedding1D": _PARALLELIZE,
        "RotaryEmbedding": _now("model.modules.rotary.RotaryEmbedding", "tables, computed once per batch"),
        "new_rotary_embedding": _now("model.modules.rotary.RotaryEmbedding", "tables, computed once per batch"),
    },
    "internlm.model.modules.linear": dict.fromkeys(
        ("new_linear", "ColumnParallelLinear", "RowParallelLinear", "ScaleColumnParallelLinear", "RewardModelLinear"),
        _LINEAR,
    ),
    "internlm.model.modules.mha": dict.fromkeys(
        ("MHA", "GQA", "SWA"), _now("model.modules.attention.Attention", "heads, groups and window are its arguments")
    ),
    "internlm.model.modules.mlp": dict.fromkeys(
        ("FeedForward", "new_feed_forward", "split_fused_mlp_weight"),
        _now("model.modules.feed_forward.FeedForward", "mlp_layer_fusion fuses w1 and w3"),
    ),
    "internlm.model.modules.norm": {"new_layer_norm": _NORM},
    "internlm.model.moe": dict.fromkeys(("MoE", "Experts"), _MOE),
    "internlm.model.registry": dict.fromkeys(
        ("model_initializer", "hf_config_initializer", "register_model_initializer", "benchmark_initializer"), _REGISTRY
    ),
    "internlm.model.utils": {"try_import_RMSNorm": _NORM, "is_moe_param": _IS_MOE},
    "internlm.monitor": {
        "initialize_monitor_manager": _ALERT,
        "internevo_monitor": _ALERT,
        "send_alert_message": _ALERT,
        "send_heartbeat": _gone("no heartbeat is sent; metrics.jsonl gets a line per step"),
        "set_env_var": _gone("the state of a run is not stored in the environment"),
    },
    "internlm.monitor.monitor": dict.fromkeys(
        ("monitor_manager", "send_alert_message", "initialize_monitor_manager"), _ALERT
    ),
    "internlm.monitor.alert": {"send_feishu_msg_with_webhook": _ALERT},
    "internlm.solver.activation_checkpoint": {
        "activation_checkpoint": _now("model.recompute.recomputed", "model.checkpoint in the config")
    },
    "internlm.solver.beta2_scheduler": {"Beta2Scheduler": _BETA2},
    "internlm.solver.lr_scheduler": {"FineTuneCosineAnnealingWarmupLR": _LR, "CosineAnnealingWarmupLR": _LR},
    "internlm.solver.optimizer": dict.fromkeys(
        ("HybridZeroOptimizer", "HybridZeroOptimizer_v2", "BaseOptimizer"), _OPTIMIZER
    )
    | {"FSDPadaptOptimizer": _FSDP},
    "internlm.solver.optimizer.hybrid_zero_optim": {"HybridZeroOptimizer": _OPTIMIZER, "BaseOptimizer": _OPTIMIZER},
    "internlm.solver.optimizer.utils": {"DynamicGradScaler": _SCALER},
    "internlm.solver.schedulers": {"FineTuneCosineAnnealingWarmupLR": _LR, "Beta2Scheduler": _BETA2},
    "internlm.solver.schedulers.beta2_scheduler": {"Beta2Scheduler": _BETA2},
    "internlm.solver.schedulers.lr_scheduler": {"FineTuneCosineAnnealingWarmupLR": _LR},
    "internlm.train": {
        "initialize_model": _MODEL,
        "initialize_optimizer": _OPTIMIZER,
        "inject_model": _PARALLELIZE,
        "initialize_isp_communicator": _ISP,
        "initialize_parallel_communicator": _PARALLELIZE,
        "get_scheduler_hooks": _HOOK,
        "initialize_llm_profile": _PROFILER,
        "load_new_batch": _now("core.trainer.Trainer", "fit() takes batches from any iterable of Batch"),
        "record_current_batch_training_metrics": _NUMBERS,
        "wrap_FSDP_model": _FSDP,
        "get_train_data_loader": _TRAIN_DATA,
        "get_validation_data_loader": _VALID_DATA,
        "set_fp32_attr_for_model": _AMP,
        "set_parallel_attr_for_param_groups": _ATTRIBUTE,
        "set_param_unique_tracking_name": _ATTRIBUTE,
    },
    "internlm.utils.common": {
        "parse_args": _PARSER,
        "get_current_device": _DEVICE,
        "BatchSkipper": _SKIP,
        "get_megatron_flops": _FLOPS,
        "SchedulerHook": _HOOK,
        "launch_time": _gone("a run's folder is RUN/<job>/<time>, or --run-dir"),
        "get_master_node": _LAUNCH,
        "get_process_rank": _LAUNCH,
        "set_random_seed": _SEED,
        "move_to_device": _now("data.batch.MicroBatch", "micro.to(device)"),
        "SingletonMeta": _gone("nothing is global"),
        "enable_pytorch_expandable_segments": _gone(
            "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment of the run"
        ),
        "check_cuda_env": _now("commands.doctor.run", "`internlm doctor`"),
    },
    "internlm.utils.evaluation": {"evaluate_on_val_dls": _EVALUATE},
    "internlm.utils.gputest": {"empty_cache_and_diag": _COLLECT, "warmup_process_group": _LAUNCH},
    "internlm.utils.logger": {"get_logger": _LOGGER, "initialize_uniscale_logger": _LOGGER},
    "internlm.utils.megatron_timers": {"megatron_timer": _TIMER, "Timer": _TIMER, "Timers": _TIMER},
    "internlm.utils.model_checkpoint": {"CheckpointManager": _MANAGER, "load_model_checkpoint": _MANAGER}
    | dict.fromkeys(
        ("save_checkpoint", "load_optimizer_checkpoint", "load_context", "load_sampler", "load_scheduler"), _MANAGER
    ),
    "internlm.utils.parallel": {
        "get_parallel_log_file_name": _LOGGER,
        "is_using_isp": _CONTEXT,
        "is_using_fsdp": _FSDP,
        "is_using_moe": _gone("config.model.num_experts > 1"),
        "is_no_pp_or_last_stage": _CONTEXT,
        "is_using_sequence_parallel": _CONTEXT,
        "sync_model_param": _PARALLELIZE,
        "sync_model_param_within_tp": _PARALLELIZE,
        "sync_model_replica_param_group": _PARALLELIZE,
        "set_model_params_layer_name": _ATTRIBUTE,
    }
    | dict.fromkeys(
        (
            "is_replica_zero_parallel_parameter",
            "is_tensor_zero_parallel_parameter",
            "is_weight_zero_parallel_parameter",
        ),
        _ATTRIBUTE,
    ),
    "internlm.utils.registry": {"MODEL_INITIALIZER": _REGISTRY, "Registry": _REGISTRY},
    "internlm.utils.simple_memory_profiler": {
        "SimpleMemoryProfiler": _gone(
            "`internlm layout` shows the memory of a layout, and torch.cuda.memory's snapshots that of a run"
        )
    },
    "internlm.utils.storage_manager": dict.fromkeys(
        (
            "get_storage_manager",
            "init_storage_manager",
            "get_fns",
            "llm_load",
            "llm_save",
            "check_folder",
            "try_get_storage_backend",
            "wait_async_upload_finish",
        ),
        _STORAGE,
    ),
    "internlm.utils.timeout": {
        "llm_timeout": _gone("functions have no time limit; monitor.collective_timeout_seconds limits collectives")
    },
    "internlm.utils.utils": {
        "DataType": _gone("words: data.type in the config"),
        "ModelType": _REGISTRY,
        "TensorParallelMode": _ISP,
    },
    "internlm.utils.writer": {"Writer": _WRITER},
}
"""Module -> its names, those that InternEvo's train.py, generate.py, tests, tools and documentation import."""


def explain_name(module: str, name: str) -> str | None:
    """The message for the import of a name from a module; None if InternEvo has no such name there."""
    former = NAMES.get(module, {}).get(name)
    return None if former is None else _sentence(f"{module}.{name}", f"{former.text()}. ")


def explain_module(module: str) -> str | None:
    """The message for the import of a module; None if InternEvo has no such module."""
    prefix = f"{module}."
    names = {
        f"{known}.{name}".removeprefix(prefix): former
        for known in NAMES
        if known == module or known.startswith(prefix)
        for name, former in NAMES[known].items()
    }
    lines = "".join(f"\n  {name}: {former.text()}" for name, former in names.items())
    return _sentence(module, f"of its names,{lines}\n") if names else None


def _sentence(fullname: str, where: str) -> str:
    return f"{fullname} is InternEvo's and does not exist here: {where}See {PAGE}"


def markdown() -> str:
    """The table of all names, for the page."""
    # Without the package, as these are no names of this one.
    prefix = "internlm."
    rows = ["| InternEvo, below `internlm` | here | |", "|---|---|---|"]
    for module, names in NAMES.items():
        by_place: dict[Former, list[str]] = {}
        for name, former in names.items():
            by_place.setdefault(former, []).append(name)
        for former, group in by_place.items():
            shown = ", ".join(f"`{name}`" for name in group)
            new = "-" if former.new is None else f"`{former.new}`"
            rows.append(
                f"| `{module.removeprefix(prefix)}`: {shown} | {new} | {former.note.replace('|', chr(92) + '|')} |"
            )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
