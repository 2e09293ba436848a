"""Activations of this rank's layers: what each saves for backward, and where, as the config asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from internlm.config.schema import Config
from internlm.core.context.layout import ParallelLayout
from internlm.core.scheduler.stage_placement import Placement
from internlm.estimate.activations import LayerActivations
from internlm.estimate.dimensions import ModelDimensions
from internlm.initialize.recomputation_plan import ActivationPlan, plan_activations
from internlm.model.decoder import Decoder, DecoderLayer
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
        "model.checkpoint_budget": config.model.checkpoint_budget,
        "cpu_offloading.enable": config.cpu_offloading.enable,
        "selective_checkpoint_offload": config.selective_checkpoint_offload,
    }
    for key, value in asked.items():
        if value and not isinstance(model, Decoder):
            raise ConfigError(
                f"{key} = {value}: the layers of a {config.model_type} are not known here; leave it out, or make the "
                f"model an internlm.model.decoder.Decoder"
            )
    if config.model.checkpoint_budget is not None:
        assert isinstance(model, Decoder)
        for place in range(placement.num_ranks):
            layers = [
                layer for chunk in range(placement.num_chunks) for layer in stages[placement.stage_of(place, chunk)]
            ]
            _plan(config, model, layout, layers, config.model.checkpoint_budget)


def arrange_activations(
    config: Config, chunks: Sequence[nn.Module], layout: ParallelLayout, device: torch.device
) -> None:
    """Set what the layers of a rank's chunks save for backward, and what of it goes to host memory."""
    decoders = [chunk for chunk in chunks if isinstance(chunk, Decoder)]
    layers: dict[int, DecoderLayer] = {
        int(name): cast(DecoderLayer, layer) for decoder in decoders for name, layer in decoder.layers.items()
    }
    if config.model.checkpoint_budget is not None:
        plan = _plan(config, decoders[0], layout, sorted(layers), config.model.checkpoint_budget)
        for number, layer in layers.items():
            layer.keep = plan.policies[number]
        logger.info("activations: %s", plan)
    num_saved = config.cpu_offloading.num_layers if config.cpu_offloading.enable else 0
    saved_of = {int(name) for decoder in decoders for name in list(decoder.layers)[:num_saved]}
    kept_of = {
        number for number, layer in layers.items() if config.selective_checkpoint_offload and layer.keep == "attention"
    }
    if not saved_of and not kept_of:
        return
    offloading = Offloading(copy_stream_of(device), saved_of=saved_of, kept_of=kept_of)
    for decoder in decoders:
        decoder.offloading = offloading
    for number in kept_of:
        layers[number].store = offloading
    logger.info(
        "activations to host memory: of %d layer(s) all that is saved, of %d attention's output",
        len(saved_of),
        len(kept_of),
    )
    if device.type == "cpu":
        logger.warning("cpu_offloading and selective_checkpoint_offload save nothing here: the device is the host")


def _plan(
    config: Config, model: Decoder, layout: ParallelLayout, layers: Sequence[int], budget: float
) -> ActivationPlan:
    activations = layer_activations(config, ModelDimensions.of(model.architecture), layout)
    return plan_activations(activations, layers, budget * 2**30)


def layer_activations(config: Config, dimensions: ModelDimensions, layout: ParallelLayout) -> LayerActivations:
    """Activations of a layer of the model, of one micro-batch of the config."""
    data = config.data
    return LayerActivations(dimensions, layout, data.seq_len * data.micro_bsz, data.seq_len)


def save_policies(
    config: Config, model: Decoder, layout: ParallelLayout, layers: Sequence[int]
) -> Mapping[int, SavePolicy]:
    """Save policy of each of a rank's `layers`: that of the config, or that of the plan for its budget."""
    budget = config.model.checkpoint_budget
    if budget is not None:
        return _plan(config, model, layout, layers, budget).policies
    return {layer: model.architecture.kept_activations[layer] for layer in layers}
