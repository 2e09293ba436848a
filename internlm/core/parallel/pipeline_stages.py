"""Which layers make a stage of a pipeline, and the stages that one rank holds.

Knows of a model only what `PipelineModel` says, and of a schedule only where it places the stages.
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
    """What a model must have to be cut into stages; see `internlm.model.decoder.Decoder`.

    Attributes:
        residual_size, residual_dtype: of the residual stream `[B, S, residual_size]` that stages hand on.
    """

    residual_size: int
    residual_dtype: torch.dtype

    def keep_stage(self, layers: range, *, is_first: bool, is_last: bool) -> None:
        """Become the stage with these layers, with the embedding and the head only at the ends."""


class StagePlaces(Protocol):
    """Where the stages are; see `internlm.core.scheduler.stage_placement.Placement`."""

    @property
    def num_stages(self) -> int:
        """Stages of the whole model."""

    @property
    def num_chunks(self) -> int:
        """Stages that each rank holds."""

    def stage_of(self, rank: int, chunk: int) -> int:
        """The stage that a rank's chunk is."""


@dataclass(frozen=True)
class LayerCosts:
    """What a stage costs beyond its layers, in units of one layer.

    Attributes:
        embedding: of the first stage.
        head: of the last stage: output head and loss.
    """

    embedding: float = 0.0
    head: float = 0.0


def split_layers(
    num_layers: int, num_stages: int, *, sizes: Sequence[int] | None = None, costs: LayerCosts | None = None
) -> list[range]:
    """The layers of each stage, contiguous and in order, at least one a stage.

    Args:
        sizes: layers of each stage, as a user gives them.
        costs: without `sizes`: make the most expensive stage as cheap as can be, and among such splits take the most
            even one. By default all stages get the same number of layers, and what is left over goes to the last ones,
            one each, as in InternEvo.

    Raises:
        ConfigError: there are fewer layers than stages, or `sizes` do not fit.
    """
    check_layer_split(num_layers, num_stages, sizes)
    if sizes is None:
        sizes = _uniform_sizes(num_layers, num_stages) if costs is None else _even_sizes(num_layers, num_stages, costs)
    return [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _uniform_sizes(num_layers: int, num_stages: int) -> list[int]:
    whole, left = divmod(num_layers, num_stages)
    return [whole + (stage >= num_stages - left) for stage in range(num_stages)]


def _even_sizes(num_layers: int, num_stages: int, costs: LayerCosts) -> list[int]:
    """Sizes of the smallest (largest cost, sum of squared costs): exact, by trying the last cut of every prefix."""

    def cost(stage: int, size: int) -> float:
        return size + (costs.embedding if stage == 0 else 0) + (costs.head if stage == num_stages - 1 else 0)

    @cache
    def smallest_peak(stage: int, layers: int) -> float:
        """The cost of the most expensive of the stages up to `stage`, which hold the first `layers` layers."""
        if stage == 0:
            return cost(0, layers)
        sizes = range(1, layers - stage + 1)
        return min(max(smallest_peak(stage - 1, layers - size), cost(stage, size)) for size in sizes)

    peak = smallest_peak(num_stages - 1, num_layers)

    @cache
    def most_even(stage: int, layers: int) -> tuple[float, tuple[int, ...]]:
        """Sum of squared costs, infinite where a stage costs more than `peak`, and the sizes."""
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

    A weight that the first and the last stage both hold (a tied embedding) is one parameter where they are on one rank;
    on two ranks both start with the same values, and their gradients are summed.

    Args:
        make_model: the whole model; called under `torch.device("meta")`.
        context: where this rank stands.
        places: which rank holds which stage.
        layers: of each stage, from `split_layers`.
        seed, options: see `parallelize`.

    Raises:
        ConfigError: there are several stages, and the model cannot be cut.
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
    """One stage of a model on the meta device; the arguments are those of `build_stages`.

    Raises:
        ConfigError: there are several stages, and the model cannot be cut.
    """
    with torch.device("meta"):
        model = make_model()
    if len(layers) > 1:
        if not isinstance(model, PipelineModel):
            raise ConfigError(
                f"{PIPELINE_SIZE} times model.num_chunks = {len(layers)} stages: {type(model).__name__} cannot be cut, "
                f"as it has no keep_stage(layers, *, is_first, is_last), residual_size and residual_dtype; give it "
                f"these (see internlm.model.decoder.Decoder) or set both keys to 1"
            )
        model.keep_stage(layers[stage], is_first=stage == 0, is_last=stage == len(layers) - 1)
    return model


def _sum_over_ends(chunk: nn.Module, names_at_the_other_end: set[str]) -> None:
    for parameter in chunk.parameters():
        spec = shard_spec_of(parameter)
        if spec.name in names_at_the_other_end:
            attach_shard_spec(parameter, replace(spec, partial_over=(*spec.partial_over, "pipeline_ends")))
