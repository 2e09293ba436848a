"""What each rank would hold of a model under a config: layers, parameters and bytes, without storage or processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import nn

from internlm.config.schema import Config
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.fsdp import kept_whole, rows_of
from internlm.core.parallel.parallelize import shard_specs
from internlm.core.parallel.pipeline_stages import meta_stage
from internlm.core.parallel.shard_spec import ShardSpec
from internlm.core.scheduler.stage_placement import Placement
from internlm.initialize.stages import build_layer_split, build_meta_model, build_options, state_form
from internlm.solver.optimizer.state_form import FP32_STATE, StateForm, wide


@dataclass(frozen=True)
class Holding:
    """The parameters of a rank and what training keeps of them, in bytes; no activations, and no padding of buffers.

    Attributes:
        parameters: elements.
        weights: as the model computes with them.
        gradients: accumulated over micro batches, and this rank's share of their sum over the data ranks.
        masters: fp32 weights of the optimizer; without FSDP, fp32 parameters are their own.
        moments: the two of AdamW.
        host: masters and moments that are offloaded; then they do not count above.
    """

    parameters: int = 0
    weights: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    host: int = 0

    @classmethod
    def of(cls, spec: ShardSpec, dtype: torch.dtype, context: ParallelContext, form: StateForm = FP32_STATE) -> Holding:
        """What a rank holds for one parameter."""
        numel = math.prod(spec.local_shape)
        zero = context.size("zero", spec.view)
        is_fsdp = "zero" in spec.sharded_over
        # Under FSDP the parameter itself is the share of this rank.
        share = numel if is_fsdp else -(-numel // zero)
        masters = wide(dtype).itemsize * share if is_fsdp or form.has_master(dtype) else 0
        moments = 2 * form.moment_dtype(dtype).itemsize * share
        return cls(
            parameters=numel,
            weights=numel * dtype.itemsize,
            gradients=form.gradient_dtype(dtype).itemsize * (numel if is_fsdp or zero == 1 else numel + share),
            masters=0 if form.is_offloaded else masters,
            moments=0 if form.is_offloaded else moments,
            host=masters + moments if form.is_offloaded else 0,
        )

    @classmethod
    def sum(cls, holdings: Iterable[Holding]) -> Holding:
        """All of them together."""
        rows = [astuple(holding) for holding in holdings]
        return cls(*(sum(column) for column in zip(*rows, strict=True)))

    @property
    def all_bytes(self) -> int:
        """Bytes on the device: weights, gradients, masters and moments."""
        return self.weights + self.gradients + self.masters + self.moments


@dataclass(frozen=True)
class PipelineHolding:
    """What one rank holds.

    Attributes:
        layers: of each of its chunks.
        has_embedding, has_head: whether it holds an end of the model.
        holding: its parameters.
    """

    layers: tuple[range, ...]
    has_embedding: bool
    has_head: bool
    holding: Holding


def pipeline_holdings(
    config: Config, layout: ParallelLayout, placement: Placement, ranks: Sequence[int]
) -> list[PipelineHolding]:
    """What some ranks hold.

    Args:
        config: a checked config.
        layout: of all ranks.
        placement: which rank along the pipeline holds which stage.
        ranks: of the job.

    Raises:
        ConfigError: the model cannot be cut into these stages.
    """
    layers, options, form = build_layer_split(config), build_options(config), state_form(config)
    whole = build_meta_model(config)

    def copy_of_whole() -> nn.Module:
        """Much faster than building the model again for each stage."""
        return copy.deepcopy(whole)

    holdings = []
    for rank in ranks:
        context = ParallelContext(layout, rank, torch.device("cpu"))
        stages = [placement.stage_of(context.index("pipeline"), chunk) for chunk in range(placement.num_chunks)]
        parts: list[Holding] = []
        seen: set[str] = set()
        for stage in stages:
            model = meta_stage(copy_of_whole, stage, layers)
            specs = list(shard_specs(model, context, options))
            if config.parallel.uses_fsdp:
                specs = _split_by_fsdp(model, specs, context)
            # A weight that two chunks of a rank share (a tied embedding) is there once.
            parts += [Holding.of(spec, p.dtype, context, form) for name, spec, p in specs if name not in seen]
            seen |= {name for name, _, _ in specs}
        holdings.append(
            PipelineHolding(
                layers=tuple(layers[stage] for stage in stages),
                has_embedding=0 in stages,
                has_head=placement.num_stages - 1 in stages,
                holding=Holding.sum(parts),
            )
        )
    return holdings


def _split_by_fsdp(
    model: nn.Module, specs: list[tuple[str, ShardSpec, nn.Parameter]], context: ParallelContext
) -> list[tuple[str, ShardSpec, nn.Parameter]]:
    size, index = context.size("zero"), context.index("zero")
    kept = kept_whole(model) if size > 1 else set(model.parameters())
    return [(name, spec if p in kept else rows_of(spec, size, index), p) for name, spec, p in specs]
