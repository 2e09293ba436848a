"""Estimates for the ranks of a config: parameters, memory and bytes sent, without storage or processes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from internlm.config.schema import Config
from internlm.core.context.layout import ParallelLayout
from internlm.core.scheduler.schedules import PipelineSchedule
from internlm.estimate.communication import BytesSent, TrainingStep, bytes_sent
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.memory import RankMemory, peak_activations
from internlm.estimate.parameters import RankParameters, rank_parameters
from internlm.initialize.activation_memory import estimated_architecture, layer_activations, save_policies
from internlm.initialize.stages import build_layer_split, build_meta_model, build_options, parameter_groups, state_form


@dataclass(frozen=True)
class RankEstimate:
    """What one rank holds and sends.

    Attributes:
        held: its parameters.
        memory: bytes of weights, gradients and optimizer states.
        activations: most bytes of activations in its layers during a step; None where the model's layers are unknown.
        sent: bytes that it sends in a step; None where the model's layers are unknown.
    """

    held: RankParameters
    memory: RankMemory
    activations: float | None
    sent: BytesSent | None


def estimate_ranks(
    config: Config, layout: ParallelLayout, schedule: PipelineSchedule, ranks: Sequence[int]
) -> list[RankEstimate]:
    """Estimate some ranks of a job.

    Args:
        config: a checked config.
        layout: of all ranks.
        schedule: of a step.
        ranks: ranks of the job.

    Raises:
        ConfigError: the model cannot be cut into these stages.
    """
    stage_layers, options, form = build_layer_split(config), build_options(config), state_form(config)
    model, groups = build_meta_model(config), parameter_groups(config)

    def make_model() -> nn.Module:
        """Much faster than building the model again for each stage."""
        return copy.deepcopy(model)

    estimates = []
    for rank in ranks:
        held = rank_parameters(
            make_model,
            layout,
            rank,
            schedule.placement,
            stage_layers,
            options,
            fsdp=config.parallel.uses_fsdp,
            groups=groups,
        )
        memory = RankMemory.of_rank(held, form)
        architecture = estimated_architecture(model)
        if architecture is None:
            estimates.append(RankEstimate(held, memory, None, None))
            continue
        dimensions = ModelDimensions.of(architecture)
        layers = [layer for chunk in held.layers for layer in chunk]
        policies = save_policies(config, model, layout, layers)
        step = TrainingStep(
            dimensions=dimensions,
            tokens=config.data.seq_len * config.data.micro_bsz,
            num_micro_batches=config.data.micro_num,
            policies=policies,
            options=options,
            form=form,
        )
        actions = schedule.actions[held.context.index("pipeline")]
        activations = peak_activations(actions, held.layers, layer_activations(config, dimensions, layout), policies)
        sent = bytes_sent(held, step, actions, schedule.placement)
        estimates.append(RankEstimate(held, memory, activations, sent))
    return estimates
