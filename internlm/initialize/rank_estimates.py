"""Estimates the parameters, memory and traffic of single ranks from a config, without storage or processes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from internlm.config.schema import Config
from internlm.core.context.layout import ParallelLayout
from internlm.core.parallel.context.split_batch import ContextPlans
from internlm.core.scheduler.schedules import PipelineSchedule
from internlm.estimate.communication import BytesSent, bytes_sent
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.memory import RankMemory, peak_activations
from internlm.estimate.parameters import RankParameters, rank_parameters
from internlm.estimate.training_step import TrainingStep, context_plans
from internlm.initialize.activation_memory import estimated_architecture, layer_activations, save_policies
from internlm.initialize.context_options import lengths_of_rows, tokens_per_rank
from internlm.initialize.stages import build_layer_split, build_meta_model, build_options, parameter_groups, state_form
from internlm.solver.optimizer.parameter_groups import check_groups


@dataclass(frozen=True)
class RankEstimate:
    """Parameters, memory and traffic of one rank.

    Attributes:
        parameters: of this rank.
        memory: bytes of weights, gradients and optimizer states.
        activations: peak bytes of its layers' activations during a step; None if the model's layers are unknown.
        sent: bytes that it sends per step; None if the model's layers are unknown.
        worst_activations: like `activations`, if all tokens choose experts of this rank; None without experts.
        context: how context ranks share a micro-batch of one document a row; None without them.
    """

    parameters: RankParameters
    memory: RankMemory
    activations: float | None
    sent: BytesSent | None
    worst_activations: float | None = None
    context: ContextPlans | None = None


def estimate_ranks(
    config: Config, layout: ParallelLayout, schedule: PipelineSchedule, ranks: Sequence[int]
) -> list[RankEstimate]:
    """Estimate some ranks of a job.

    Args:
        config: a checked config.
        layout: of all ranks.
        schedule: of one step.
        ranks: the ranks to estimate.

    Raises:
        ConfigError: the model cannot be cut into these stages, or a parameter group applies to no parameter.
    """
    stage_layers, options, form = build_layer_split(config), build_options(config), state_form(config)
    model, groups = build_meta_model(config), parameter_groups(config)
    check_groups(groups, dict(model.named_parameters()))

    def make_model() -> nn.Module:
        """Copy the model, which is much faster than rebuilding it for each stage."""
        return copy.deepcopy(model)

    estimates = []
    for rank in ranks:
        parameters = rank_parameters(
            make_model,
            layout,
            rank,
            schedule.placement,
            stage_layers,
            options,
            fsdp=config.parallel.uses_fsdp,
            groups=groups,
            num_later=config.model.num_nextn_predict_layers,
        )
        memory = RankMemory.of_rank(parameters, form)
        architecture = estimated_architecture(model)
        if architecture is None:
            estimates.append(RankEstimate(parameters, memory, None, None))
            continue
        dimensions = ModelDimensions.of(architecture)
        layers = [layer for chunk in parameters.layers for layer in chunk]
        policies = save_policies(config, model, layout, layers)
        step = TrainingStep(
            dimensions=dimensions,
            tokens=tokens_per_rank(config.data, layout),
            lengths=lengths_of_rows(config.data, layout),
            num_micro_batches=config.data.micro_num,
            policies=policies,
            options=options,
            form=form,
        )
        actions = schedule.actions[parameters.context.index("pipeline")]
        one_layer = layer_activations(config, dimensions, layout, parameters.context.index("context"))
        activations = peak_activations(actions, parameters.layers, one_layer, policies)
        worst = None
        if dimensions.experts is not None:
            worst = peak_activations(actions, parameters.layers, replace(one_layer, is_worst=True), policies)
        sent = bytes_sent(parameters, step, actions, schedule.placement)
        plans = context_plans(parameters.context, step) if layout.context > 1 else None
        estimates.append(RankEstimate(parameters, memory, activations, sent, worst, plans))
    return estimates
