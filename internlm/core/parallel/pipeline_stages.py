"""Splits the layers of a model into pipeline stages, and builds the stages of one rank.

Depends on a model only through `PipelineModel`, and on a schedule only through its placement of stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.weight_gradients import WeightGradients
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.core.parallel.parallelize import parallelize
from internlm.core.parallel.shard_spec import attach_shard_spec, shard_spec_of
from internlm.utils.errors import ConfigError
from internlm.utils.layout_checks import check_layer_split

LAYER_SPLIT, PIPELINE_SIZE = "parallel.pipeline.layer_split", "parallel.pipeline.size"


@runtime_checkable
class PipelineModel(Protocol):
    """A model that can be cut into pipeline stages; see `internlm.model.decoder.Decoder`.

    Attributes:
        residual_size, residual_dtype: of the residual stream `[B, S, residual_size]` that stages pass on.
    """

    residual_size: int
    residual_dtype: torch.dtype

    def keep_stage(self, layers: range, *, is_first: bool, is_last: bool) -> None:
        """Remove everything that is not part of one stage.

        Args:
            layers: the layers of the stage.
            is_first: whether it has the embedding.
            is_last: whether it has the final norm and the output head.
        """


class StagePlaces(Protocol):
    """Which rank holds which stage; see `internlm.core.scheduler.stage_placement.Placement`."""

    @property
    def num_stages(self) -> int:
        """Number of stages of the whole model."""

    @property
    def num_chunks(self) -> int:
        """Number of stages that each rank holds."""

    def stage_of(self, rank: int, chunk: int) -> int:
        """The stage that is chunk `chunk` of rank `rank`."""


@dataclass(frozen=True)
class LayerCosts:
    """Costs of a stage besides its layers, in units of one layer.

    Attributes:
        embedding: of the first stage.
        head: of the last stage: output head and loss.
    """

    embedding: float = 0.0
    head: float = 0.0


def split_layers(
    num_layers: int, num_stages: int, *, sizes: Sequence[int] | None = None, costs: LayerCosts | None = None
) -> list[range]:
    """The layers of each stage: contiguous, in order, at least one per stage.

    By default all stages get the same number of layers; the remaining ones go to the last stages, one each, as in
    InternEvo.

    Args:
        num_layers: layers of the model.
        num_stages: stages of the pipeline.
        sizes: number of layers of each stage, from the config.
        costs: without `sizes`: minimize the cost of the most expensive stage; among such splits take the most even.

    Raises:
        ConfigError: there are fewer layers than stages, or `sizes` do not add up.
    """
    check_layer_split(num_layers, num_stages, sizes)
    if sizes is None:
        sizes = _uniform_sizes(num_layers, num_stages) if costs is None else _even_sizes(num_layers, num_stages, costs)
    return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _uniform_sizes(num_layers: int, num_stages: int) -> list[int]:
    quotient, remainder = divmod(num_layers, num_stages)
    return [quotient + (stage >= num_stages - remainder) for stage in range(num_stages)]


def _even_sizes(num_layers: int, num_stages: int, costs: LayerCosts) -> list[int]:
    """Sizes that minimize (largest cost, sum of squared costs): exact, by dynamic programming over prefixes."""

    def cost(stage: int, size: int) -> float:
        return size + (costs.embedding if stage == 0 else 0) + (costs.head if stage == num_stages - 1 else 0)

    @cache
    def smallest_peak(stage: int, layers: int) -> float:
        """Smallest possible maximum cost of the stages up to `stage` when they hold the first `layers` layers."""
        if stage == 0:
            return cost(0, layers)
        sizes = range(1, layers - stage + 1)
        return min(max(smallest_peak(stage - 1, layers - size), cost(stage, size)) for size in sizes)

    peak = smallest_peak(num_stages - 1, num_layers)

    @cache
    def most_even(stage: int, layers: int) -> tuple[float, tuple[int, ...]]:
        """(sum of squared costs, sizes); the sum is infinite if a stage costs more than `peak`."""
        if stage == 0:
            return (cost(0, layers) ** 2 if cost(0, layers) <= peak else float("inf")), (layers,)
        options = []
        for size in range(1, layers - stage + 1):
            squares, sizes = most_even(stage - 1, layers - size)
            own = cost(stage, size)
            options.append((squares + own**2 if own <= peak else float("inf"), (*sizes, size)))
        return min(options)

    return list(most_even(num_stages - 1, num_layers)[1])


def build_stages(
    make_model: Callable[[], nn.Module],
    context: ParallelContext,
    places: StagePlaces,
    layers: Sequence[range],
    *,
    seed: int = 1024,
    options: ParallelOptions | None = None,
) -> list[nn.Module]:
    """This rank's chunks of a model, in chunk order, after `parallelize`.

    A weight that the first and the last stage share (a tied embedding) is one parameter if both are on one rank. On two
    ranks, both copies start with the same values, and their gradients are summed.

    Args:
        make_model: returns the whole model; called under `torch.device("meta")`.
        context: this rank's position and process groups.
        places: which rank holds which stage.
        layers: the layers of each stage, from `split_layers`.
        seed, options: see `parallelize`.

    Raises:
        ConfigError: there are several stages, and the model is not a `PipelineModel`.
    """
    rank, last = context.index("pipeline"), places.num_stages - 1
    stages = [places.stage_of(rank, chunk) for chunk in range(places.num_chunks)]
    shared: dict[str, nn.Parameter] = {}
    weight_gradients = WeightGradients()
    chunks = [
        parallelize(
            meta_stage(make_model, stage, layers),
            context,
            seed=seed,
            options=options,
            shared=shared,
            weight_gradients=weight_gradients,
        )
        for stage in stages
    ]
    if (0 in stages) != (last in stages):
        other = meta_stage(make_model, last if 0 in stages else 0, layers)
        _sum_over_ends(chunks[0 if 0 in stages else -1], {name for name, _ in other.named_parameters()})
    return chunks


def meta_stage(make_model: Callable[[], nn.Module], stage: int, layers: Sequence[range]) -> nn.Module:
    """One stage of a model on the meta device; for the arguments see `build_stages`.

    Raises:
        ConfigError: there are several stages, and the model is not a `PipelineModel`.
    """
    with torch.device("meta"):
        model = make_model()
    if len(layers) > 1:
        if not isinstance(model, PipelineModel):
            raise ConfigError(
                f"{PIPELINE_SIZE} times model.num_chunks = {len(layers)} stages: {type(model).__name__} cannot be cut, "
                f"as it lacks keep_stage(layers, *, is_first, is_last), residual_size or residual_dtype; add them (see "
                f"internlm.model.decoder.Decoder) or set both keys to 1"
            )
        model.keep_stage(layers[stage], is_first=stage == 0, is_last=stage == len(layers) - 1)
    return model


def _sum_over_ends(chunk: nn.Module, names_at_the_other_end: set[str]) -> None:
    for parameter in chunk.parameters():
        spec = shard_spec_of(parameter)
        if spec.name in names_at_the_other_end:
            attach_shard_spec(parameter, replace(spec, partial_over=(*spec.partial_over, "pipeline_ends")))
