"""Activations of this rank's layers: what each saves for backward, and where, as the config asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from internlm.config.schema import Config
from internlm.core.context.layout import ParallelLayout
from internlm.core.scheduler.stage_placement import Placement
from internlm.estimate.activations import LayerActivations
from internlm.estimate.dimensions import ModelDimensions
from internlm.initialize.recomputation_plan import ActivationPlan, plan_activations
from internlm.model.architecture import Architecture
from internlm.model.architecture import save_policies as policies_of
from internlm.model.layer_protocol import DescribedModel, LayeredModel
from internlm.model.offload import Offloading
from internlm.model.recompute import SavePolicy
from internlm.utils.copy_stream import copy_stream_of
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def check_activations(
    config: Config, model: nn.Module, layout: ParallelLayout, placement: Placement, stages: Sequence[range]
) -> None:
    """Check that the activations of every rank of a pipeline can be arranged as the config asks.

    Args:
        config: a checked config.
        model: the whole model on the meta device.
        layout: of all ranks.
        placement: which rank along the pipeline holds which stage.
        stages: layers of each stage.

    Raises:
        ConfigError: they do not fit into `model.checkpoint_budget`, or the layers of the model are not known.
    """
    asked = {
        "model.checkpoint": config.model.num_recomputed and config.model.checkpoint,
        "model.checkpoint_budget": config.model.checkpoint_budget,
        "cpu_offloading.enable": config.cpu_offloading.enable,
        "selective_checkpoint_offload": config.selective_checkpoint_offload,
    }
    for key, value in asked.items():
        if value and not isinstance(model, LayeredModel):
            raise ConfigError(
                f"{key} = {value}: a {config.model_type} does not name its layers, so nothing can be recomputed or "
                f"offloaded; leave the key out, or give {type(model).__name__} numbered_layers() and offloading (see "
                f"internlm/model/layer_protocol.py)"
            )
    if config.model.checkpoint_budget is not None:
        for place in range(placement.num_ranks):
            layers = [
                layer for chunk in range(placement.num_chunks) for layer in stages[placement.stage_of(place, chunk)]
            ]
            _plan(config, model, layout, layers, config.model.checkpoint_budget)


def arrange_activations(
    config: Config, chunks: Sequence[nn.Module], layout: ParallelLayout, device: torch.device
) -> None:
    """Give the layers of a rank's chunks the save policies and stores that the config asks for."""
    models = [chunk for chunk in chunks if isinstance(chunk, LayeredModel)]
    layers = {number: layer for model in models for number, layer in model.numbered_layers().items()}
    if config.model.checkpoint_budget is not None:
        plan = _plan(config, chunks[0], layout, sorted(layers), config.model.checkpoint_budget)
        policies = plan.policies
        logger.info("activations: %s", plan)
    else:
        policies = dict(enumerate(policies_of(config.model)))
    for number, layer in layers.items():
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
        "activations offloaded to host memory: of %d layer(s) all that is saved, of %d attention's output",
        len(autograd_layers),
        len(store_layers),
    )
    if device.type == "cpu":
        logger.warning("cpu_offloading and selective_checkpoint_offload save nothing here: the device is the host")


def _plan(
    config: Config, model: nn.Module, layout: ParallelLayout, layers: Sequence[int], budget: float
) -> ActivationPlan:
    architecture = estimated_architecture(model)
    if architecture is None:
        raise ConfigError(
            f"model.checkpoint_budget = {config.model.checkpoint_budget}: the activations of a {config.model_type} are "
            "not known, as it has no architecture or layers of other kinds; set model.checkpoint instead"
        )
    activations = layer_activations(config, ModelDimensions.of(architecture), layout)
    return plan_activations(activations, layers, budget * 2**30)


def estimated_architecture(model: nn.Module) -> Architecture | None:
    """The architecture of a model whose activations can be estimated: one of standard layers only."""
    if not isinstance(model, DescribedModel) or model.architecture.layer_kinds:
        return None
    return model.architecture


def layer_activations(config: Config, dimensions: ModelDimensions, layout: ParallelLayout) -> LayerActivations:
    """Activations of a layer of the model, of one micro-batch of the config."""
    data = config.data
    return LayerActivations(dimensions, layout, data.seq_len * data.micro_bsz, data.seq_len)


def save_policies(
    config: Config, model: nn.Module, layout: ParallelLayout, layers: Sequence[int]
) -> Mapping[int, SavePolicy]:
    """Save policy of each of a rank's `layers`: that of the config, or that of the plan for its budget."""
    budget = config.model.checkpoint_budget
    if budget is not None:
        return _plan(config, model, layout, layers, budget).policies
    policies = policies_of(config.model)
    return {layer: policies[layer] for layer in layers}
