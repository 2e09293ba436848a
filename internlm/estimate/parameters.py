"""The exact parameters of a rank, as ShardSpecs: without storage and without processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import rows_of, unsharded_parameters
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.core.parallel.parallelize import roles_by_module, shard_specs
from internlm.core.parallel.pipeline_stages import meta_stage
from internlm.core.parallel.shard_spec import ShardSpec
from internlm.core.scheduler.stage_placement import Placement
from internlm.model.roles import Role
from internlm.solver.optimizer.parameter_groups import ParameterGroup, is_frozen


@dataclass(frozen=True)
class HeldParameter:
    """A parameter, or a shard of one, on a rank.

    Attributes:
        spec: the rank's boxes of the global parameter; with FSDP, its rows.
        full: the spec of the tensor that the model computes with; without FSDP, `spec`.
        dtype: dtype of the weight.
        is_trained: whether it has a gradient and an optimizer state.
        is_embedding: whether it is the embedding, which may also be the output head.
    """

    spec: ShardSpec
    full: ShardSpec
    dtype: torch.dtype
    is_trained: bool = True
    is_embedding: bool = False

    @property
    def layer(self) -> int | None:
        """The number of its layer; None outside all layers."""
        numbers = [part for part in self.spec.name.split(".") if part.isdigit()]
        return int(numbers[0]) if numbers else None

    @property
    def is_fsdp(self) -> bool:
        """Whether FSDP shards it over the zero ranks."""
        return "zero" in self.spec.sharded_over


@dataclass(frozen=True)
class RankParameters:
    """All parameters of a rank.

    Attributes:
        context: position of the rank, without process groups.
        layers: layers of each of its chunks; in the last stage, those that predict later tokens follow.
        has_embedding: whether it has the first stage.
        has_head: whether it has the last stage.
        parameters: each parameter once, even if two chunks share it (a tied embedding).
    """

    context: ParallelContext
    layers: tuple[range, ...]
    has_embedding: bool
    has_head: bool
    parameters: tuple[HeldParameter, ...]


def rank_parameters(
    make_model: Callable[[], nn.Module],
    layout: ParallelLayout,
    rank: int,
    placement: Placement,
    stage_layers: Sequence[range],
    options: ParallelOptions,
    *,
    fsdp: bool = False,
    groups: Sequence[ParameterGroup] = (),
    num_later: int = 0,
) -> RankParameters:
    """The parameters of one rank.

    Args:
        make_model: builds the whole model on the meta device.
        layout: layout of all ranks.
        rank: rank of the job.
        placement: which pipeline rank computes which stage.
        stage_layers: layers of each stage.
        options: options of `parallelize`.
        fsdp: whether FSDP shards the weights.
        groups: parameter groups of the optimizer; frozen ones have no gradient and no state.
        num_later: layers of the last stage that predict later tokens.

    Raises:
        ConfigError: the model cannot be cut into these stages.
    """
    context = ParallelContext(layout, rank, torch.device("cpu"))
    layers: list[range] = []
    last = placement.num_stages - 1
    stages = [placement.stage_of(context.index("pipeline"), chunk) for chunk in range(placement.num_chunks)]
    has_embedding, has_head = 0 in stages, last in stages
    other_end: set[str] = set()
    if has_embedding != has_head:
        other = meta_stage(make_model, last if has_embedding else 0, stage_layers)
        other_end = {name for name, _ in other.named_parameters()}
    held: dict[str, list[HeldParameter]] = {}
    for stage in stages:
        model = meta_stage(make_model, stage, stage_layers)
        not_sharded, roles = _not_sharded_by_fsdp(model, context, fsdp), roles_by_module(model)
        layers.append(range(stage_layers[stage].start, stage_layers[stage].stop + (num_later if stage == last else 0)))
        own: dict[str, list[HeldParameter]] = {}
        for name, spec, parameter in shard_specs(model, context, options):
            if name in other_end:
                spec = replace(spec, partial_over=(*spec.partial_over, "pipeline_ends"))
            # FSDP does not shard experts that are dealt to ranks.
            is_whole = parameter in not_sharded or spec.view == "expert"
            size, index = context.size("zero", "weight"), context.index("zero", "weight")
            stored = spec if is_whole else rows_of(spec, size, index)
            is_trained = parameter.requires_grad and not is_frozen(spec.name, groups)
            is_embedding = roles.get(name.rpartition(".")[0]) is Role.EMBEDDING
            own.setdefault(name, []).append(HeldParameter(stored, spec, parameter.dtype, is_trained, is_embedding))
        held = {**own, **held}
    parameters = tuple(parameter for parts in held.values() for parameter in parts)
    return RankParameters(context, tuple(layers), has_embedding, has_head, parameters)


def _not_sharded_by_fsdp(model: nn.Module, context: ParallelContext, fsdp: bool) -> set[nn.Parameter]:
    return unsharded_parameters(model) if fsdp and context.size("zero", "weight") > 1 else set(model.parameters())
