"""Activations of this rank's layers: what each layer saves for backward, and in which memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from internlm.config.schema import Config
from internlm.core.context.layout import ParallelLayout
from internlm.core.scheduler.stage_placement import Placement
from internlm.estimate.activations import LayerActivations
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.training_step import gathered_keys
from internlm.initialize.context_options import context_options, lengths_of_rows, tokens_per_rank
from internlm.initialize.recomputation_plan import ActivationPlan, plan_activations
from internlm.model.architecture import Architecture
from internlm.model.architecture import save_policies as policies_of
from internlm.model.layer_protocol import DescribedModel, LayeredModel, MultiTokenModel
from internlm.model.offload import Offloading
from internlm.model.recompute import SavePolicy
from internlm.utils.copy_stream import copy_stream_of
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

ESTIMATED_KINDS = {"standard", "experts"}
"""Names of the kinds of layers whose activations and bytes sent have an estimate."""


def check_activations(
    config: Config, model: nn.Module, layout: ParallelLayout, placement: Placement, stages: Sequence[range]
) -> None:
    """Check the recomputation and offloading settings against the model, on every rank of a pipeline.

    Args:
        config: a checked config.
        model: the whole model on the meta device.
        layout: of all ranks.
        placement: maps each rank along the pipeline to its stages.
        stages: layers of each stage.

    Raises:
        ConfigError: the activations exceed `model.checkpoint_budget`, or the layers of the model are unknown.
    """
    settings = {
        "model.checkpoint": config.model.num_recomputed and config.model.checkpoint,
        "model.checkpoint_budget": config.model.checkpoint_budget,
        "cpu_offloading.enable": config.cpu_offloading.enable,
        "selective_checkpoint_offload": config.selective_checkpoint_offload,
    }
    for key, value in settings.items():
        if value and not isinstance(model, LayeredModel):
            raise ConfigError(
                f"{key} = {value}: a {config.model_type} does not expose its layers, so nothing can be recomputed or "
                f"offloaded; remove the key, or implement numbered_layers() and offloading in {type(model).__name__} "
                f"(see internlm/model/layer_protocol.py)"
            )
    if config.model.checkpoint_budget is not None:
        later = model.later_layers() if isinstance(model, MultiTokenModel) else ()
        for rank in range(placement.num_ranks):
            numbers = [placement.stage_of(rank, chunk) for chunk in range(placement.num_chunks)]
            layers = [layer for stage in numbers for layer in stages[stage]]
            layers += later if placement.num_stages - 1 in numbers else ()
            _plan(config, model, layout, layers, config.model.checkpoint_budget)


def arrange_activations(
    config: Config, chunks: Sequence[nn.Module], layout: ParallelLayout, device: torch.device
) -> None:
    """Set save policy and activation store of every layer in a rank's chunks, from the config."""
    models = [chunk for chunk in chunks if isinstance(chunk, LayeredModel)]
    layers = {number: layer for model in models for number, layer in model.numbered_layers().items()}
    later = {
        number: layer
        for chunk in chunks
        if isinstance(chunk, MultiTokenModel)
        for number, layer in chunk.later_layers().items()
    }
    numbers = sorted(layers | later)
    if config.model.checkpoint_budget is not None:
        plan = _plan(config, chunks[0], layout, numbers, config.model.checkpoint_budget)
        policies = plan.policies
        logger.info("activations: %s", plan)
    else:
        policies = _configured_policies(config, numbers)
    for number, layer in (layers | later).items():
        layer.save_policy = policies[number]
    num_offloaded = config.cpu_offloading.num_layers if config.cpu_offloading.enable else 0
    autograd_layers = {number for model in models for number in list(model.numbered_layers())[:num_offloaded]}
    store_layers = {
        number
        for number, layer in layers.items()
        if config.selective_checkpoint_offload and layer.save_policy == "attention"
    }
    if not autograd_layers and not store_layers:
        return
    offloading = Offloading(copy_stream_of(device), autograd_layers=autograd_layers, store_layers=store_layers)
    for model in models:
        model.offloading = offloading
    for number in store_layers:
        layers[number].store = offloading
    logger.info(
        "activations offloaded to host memory: everything saved by %d layer(s), the attention output of %d",
        len(autograd_layers),
        len(store_layers),
    )
    if device.type == "cpu":
        logger.warning("cpu_offloading and selective_checkpoint_offload save no memory: the device is the host")


def _plan(
    config: Config, model: nn.Module, layout: ParallelLayout, layers: Sequence[int], budget: float
) -> ActivationPlan:
    architecture = estimated_architecture(model)
    if architecture is None:
        raise ConfigError(
            f"model.checkpoint_budget = {config.model.checkpoint_budget}: the activations of a {config.model_type} "
            "cannot be estimated, as it has non-standard layers or no architecture; set model.checkpoint instead"
        )
    activations = layer_activations(config, ModelDimensions.of(architecture), layout)
    return plan_activations(activations, layers, budget * 2**30)


def estimated_architecture(model: nn.Module) -> Architecture | None:
    """The architecture of a model, or None if its activations cannot be estimated (layers of other kinds)."""
    if not isinstance(model, DescribedModel):
        return None
    kinds = {kind.name for kind in model.architecture.layer_kinds.values()}
    return model.architecture if kinds <= ESTIMATED_KINDS else None


def layer_activations(
    config: Config, dimensions: ModelDimensions, layout: ParallelLayout, context_rank: int | None = None
) -> LayerActivations:
    """Activations of a dense layer for one micro-batch of one document a row; `of` has those of any layer.

    Args:
        config: a checked config.
        dimensions: of the model.
        layout: of all ranks.
        context_rank: the rank along the context axis; None: the one with the most activations.
    """
    data, options = config.data, context_options(config.parallel)
    return LayerActivations(
        dimensions,
        layout,
        tokens=tokens_per_rank(data, layout),
        row_length=data.seq_len,
        gathered_keys=gathered_keys(layout, dimensions, options, lengths_of_rows(data, layout), context_rank),
    )


def save_policies(
    config: Config, model: nn.Module, layout: ParallelLayout, layers: Sequence[int]
) -> Mapping[int, SavePolicy]:
    """Save policies of a rank's `layers`: planned for `model.checkpoint_budget`, else from `model.checkpoint`."""
    budget = config.model.checkpoint_budget
    if budget is not None:
        return _plan(config, model, layout, layers, budget).policies
    return _configured_policies(config, layers)


def _configured_policies(config: Config, layers: Sequence[int]) -> dict[int, SavePolicy]:
    """The save policies of `model.checkpoint`; layers that predict later tokens have that of the last layer."""
    policies = policies_of(config.model)
    return {layer: policies[min(layer, len(policies) - 1)] for layer in layers}
