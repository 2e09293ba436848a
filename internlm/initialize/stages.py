"""Builds this rank's part of the model, and the pipeline schedule, from a config."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import nn

from internlm.config.schema import Config, ExpertWeightConfig, WeightConfig
from internlm.core.communication.objects import of_all_ranks
from internlm.core.compilation.compile_layers import check_compiler, compile_layers
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import apply_fsdp
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.pipeline_stages import LayerCosts, build_stages, split_layers
from internlm.core.parallel.shard_spec import shard_spec_of
from internlm.core.scheduler.actions import ActionKind
from internlm.core.scheduler.schedules import PipelineSchedule, make_schedule
from internlm.initialize.activation_memory import arrange_activations
from internlm.initialize.context_options import context_options
from internlm.initialize.model_flops import token_flops
from internlm.initialize.vision_costs import describe_vision
from internlm.model.hf_class.model import HfClassModel
from internlm.model.layer_protocol import DescribedModel
from internlm.model.llava.model import Llava
from internlm.model.ops.float8.scaled_gemm import why_not_on_hardware
from internlm.model.registry import build_model
from internlm.solver.optimizer.parameter_groups import ParameterGroup, check_groups, freeze_parameters
from internlm.solver.optimizer.state_form import StateForm, master_dtype
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

_TOWER = "vision_tower"
"""Module of a model that reads pictures, frozen by default."""


def build_meta_model(config: Config) -> nn.Module:
    """Build the whole model on the meta device, for parameter counts and for `parallelize`."""
    with torch.device("meta"):
        return build_model(config.model_type, config.model, norm_dtype=torch.float32 if config.use_fp32_norm else None)


def build_pipeline_schedule(config: Config) -> Callable[[int], PipelineSchedule]:
    """Return a function: number of micro-batches -> schedule of the pipeline's ranks."""
    pipeline = config.parallel.pipeline
    return partial(make_schedule, pipeline.mode, pipeline.size, num_chunks=config.model.num_chunks)


def build_layer_split(config: Config) -> list[range]:
    """The layers of each stage.

    Raises:
        ConfigError: `parallel.pipeline.layer_split` does not fit the model.
    """
    split, num_layers = config.parallel.pipeline.layer_split, config.model.num_layers
    num_stages = config.parallel.pipeline.size * config.model.num_chunks
    if split == "uniform":
        return split_layers(num_layers, num_stages)
    if split == "cost":
        return split_layers(num_layers, num_stages, costs=_layer_costs(config))
    return split_layers(num_layers, num_stages, sizes=split)


def _layer_costs(config: Config) -> LayerCosts:
    """Relative cost of layers and head in FLOPs; an embedding lookup costs none."""
    try:
        flops = token_flops(config, build_meta_model(config))
    except ConfigError as error:
        raise ConfigError(
            f"parallel.pipeline.layer_split = 'cost': {error}; give a list of layers per stage, or 'uniform'"
        ) from error
    # Layers that predict later tokens are in the last stage.
    layers = flops.causal - flops.later - flops.head
    return LayerCosts(head=(flops.head + flops.later) / (layers / config.model.num_layers))


def _gather_plan(section: WeightConfig | ExpertWeightConfig) -> GatherPlan:
    return GatherPlan(
        overlap=section.overlap,
        ahead=section.forward_overlap_per,
        layer_before=section.launch_allgather_before,
        release_gradients_early=section.early_reduce_scatter_release,
        memory_pool=section.memory_pool,
    )


def build_options(config: Config) -> ParallelOptions:
    """Collect the options of the parallel modes from the config."""
    schedule = build_pipeline_schedule(config)(config.data.micro_num)
    return ParallelOptions(
        split_embedding_hidden=config.model.embed_split_hidden,
        weight_gathering=_gather_plan(config.parallel.weight),
        expert_gathering=_gather_plan(config.parallel.expert_weight),
        reduce_dtype=reduce_dtype(config),
        postpone_weight_gradients=any(
            action.kind is ActionKind.BACKWARD_WEIGHT for actions in schedule.actions for action in actions
        ),
        float8_layers=config.float8.layers(config.model.num_layers),
        gather_float8=config.float8.gather_weights,
        compile_casts=config.float8.compile,
        context=context_options(config.parallel),
        defer_weights=config.parallel.uses_fsdp,
    )


def reduce_dtype(config: Config) -> torch.dtype:
    """The dtype in which gradients are reduced."""
    name = config.reduce_comm_dtype
    return _dtype(name) if name else master_dtype(config.model.torch_dtype)


def state_form(config: Config) -> StateForm:
    """Dtypes and location of gradients and optimizer state."""
    return StateForm(
        gradients=_dtype(config.hybrid_zero_optimizer.grad_accumulation_dtype),
        moments=_dtype(config.adam.moments_dtype),
        is_offloaded=config.hybrid_zero_optimizer.offload_optimizer,
    )


def parameter_groups(config: Config) -> list[ParameterGroup]:
    """The parameter groups of the optimizer; a vision tower is frozen where no group of the config names it.

    A group names it if its pattern begins with "vision_tower". Patterns such as "*.bias" do not train the tower.
    """
    groups = _groups_of_config(config)
    if config.model_type != "LLAVA":
        return groups
    first = next((n for n, group in enumerate(groups) if group.match.startswith(_TOWER)), len(groups))
    return [*groups[:first], ParameterGroup(f"{_TOWER}.*", freeze=True), *groups[first:]]


def check_parameter_groups(config: Config, names: Collection[str]) -> None:
    """Compare the groups of the config with the global names of all parameters of the model.

    Raises:
        ConfigError: see `check_groups`.
    """
    if config.optimizer.groups:
        check_groups(_groups_of_config(config), names)


def _groups_of_config(config: Config) -> list[ParameterGroup]:
    return [ParameterGroup(**group.model_dump()) for group in config.optimizer.groups]


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name.removeprefix("torch."))


def build_chunks(config: Config, context: ParallelContext) -> list[nn.Module]:
    """Build this rank's chunks of the model; without a pipeline, a single one.

    Raises:
        ConfigError: the model cannot be cut into these stages or sharded by FSDP, or this machine cannot compile it,
            run its GEMMs in float8 or compute in float64.
    """
    if config.model.torch_dtype == torch.float64 and context.device.type == "cuda":
        raise ConfigError("model.dtype = 'torch.float64' is for comparisons on a CPU; set 'torch.bfloat16'")
    if config.float8.enable_float8_linear and context.device.type == "cuda":
        missing = why_not_on_hardware(context.device)
        if missing is not None:
            raise ConfigError(f"float8.enable_float8_linear = True: {missing}; set it to False")
    chunks = build_stages(
        partial(build_meta_model, config),
        context,
        build_pipeline_schedule(config)(config.data.micro_num).placement,
        build_layer_split(config),
        seed=config.seed,
        options=build_options(config),
    )
    if isinstance(chunks[0], HfClassModel) and context.is_main_rank:
        for line in chunks[0].notices(context.layout.tensor, context.layout.mode):
            logger.info(line)
    num_later = config.model.num_nextn_predict_layers
    if num_later and not isinstance(chunks[0], DescribedModel):
        raise ConfigError(
            f"model.num_nextn_predict_layers = {num_later} has no effect: a {config.model_type} is no decoder of this "
            "package; leave the key out"
        )
    groups = parameter_groups(config)
    if config.optimizer.groups:
        names = {shard_spec_of(parameter).name for chunk in chunks for parameter in chunk.parameters()}
        check_parameter_groups(config, set().union(*of_all_ranks(context, names)))
    if config.model_type == "LLAVA" and not any(group.match.startswith(_TOWER) for group in config.optimizer.groups):
        logger.info(
            "the vision tower is frozen; to train it, give optimizer.groups one whose match begins with '%s'", _TOWER
        )
    freeze_parameters(chunks, groups)
    if isinstance(chunks[0], Llava):
        logger.info(describe_vision(chunks[0], groups, config.data.seq_len))
    if config.float8.enable_float8_linear and config.float8.compile:
        check_compiler(context.device, key="float8.compile")
    if config.model.compile:
        check_compiler(context.device, key="model.compile")
        has_graphs = config.model.cuda_graphs and context.device.type == "cuda"
        if config.model.cuda_graphs and not has_graphs:
            logger.warning("model.cuda_graphs has no effect: there is no GPU")
        if isinstance(chunks[0], Llava):
            logger.info("model.compile: the layers of the decoder are compiled, vision tower and projector are not")
        for chunk in chunks:
            compile_layers(chunk, cuda_graphs=has_graphs)
    if config.parallel.uses_fsdp:
        for chunk in chunks:
            scales = parallel_of(chunk).weight_scales if config.float8.gather_weights else None
            apply_fsdp(chunk, context, reduce_dtype=reduce_dtype(config), float8_scales=scales)
    arrange_activations(config, chunks, context.layout, context.device)
    return chunks
