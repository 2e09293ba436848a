"""What of a config determines the bytes that a step sends, and how its context ranks share a micro-batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.context.key_gathering import KeyGathering, make_key_gathering
from internlm.core.parallel.context.split_batch import ContextOptions, ContextPlans, ContextSplit
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.estimate.dimensions import ModelDimensions
from internlm.model.recompute import SavePolicy
from internlm.solver.optimizer.state_form import StateForm


@dataclass(frozen=True)
class TrainingStep:
    """The parts of a config that determine the bytes sent in a step.

    Attributes:
        dimensions: dimensions of the model.
        tokens: tokens of a micro-batch on the tensor ranks of one context rank.
        lengths: of the documents of a micro-batch.
        num_micro_batches: micro-batches of a step.
        policies: save policy of each layer of the rank, by layer number.
        options: options of `parallelize`; `reduce_dtype` is the dtype of gradients in collectives.
        form: dtypes of gradients and optimizer states.
    """

    dimensions: ModelDimensions
    tokens: int
    lengths: tuple[int, ...]
    num_micro_batches: int
    policies: Mapping[int, SavePolicy]
    options: ParallelOptions
    form: StateForm


def context_plans(context: ParallelContext, step: TrainingStep) -> ContextPlans:
    """Cut and plans of attention of a rank, for a micro-batch of `step`."""
    return _plans(context.index("context"), context.layout, step.dimensions, step.options.context, step.lengths)


def gathered_keys(
    layout: ParallelLayout,
    dimensions: ModelDimensions,
    options: ContextOptions,
    lengths: tuple[int, ...],
    rank: int | None = None,
) -> dict[int | None, int]:
    """Attention window (None: no limit) -> tokens whose latent vectors are gathered over context ranks; empty: none.

    Args:
        layout: of all ranks.
        dimensions: of the model.
        options: how context ranks share attention.
        lengths: of the documents of a micro-batch.
        rank: context rank; None: the one that gathers the most.
    """
    if dimensions.latent is None or not layout.gathers_latents:
        return {}
    pieces = _plans(0, layout, dimensions, options, lengths).pieces
    ranks = range(layout.context) if rank is None else [rank]
    windows = {dimensions.window(layer) for layer in range(dimensions.num_layers)}
    return {window: max(make_key_gathering(pieces, each, window).num_keys for each in ranks) for window in windows}


def _plans(
    rank: int, layout: ParallelLayout, dimensions: ModelDimensions, options: ContextOptions, lengths: tuple[int, ...]
) -> ContextPlans:
    windows = Counter(dimensions.window(layer) for layer in range(dimensions.num_layers))
    split = ContextSplit(
        *(rank, layout.context, layout.tensor, windows, options),
        gathers_keys=dimensions.latent is not None and layout.gathers_latents,
    )
    return split.plan(lengths)


def gathering_of(context: ParallelContext, step: TrainingStep, layer: int) -> KeyGathering | None:
    """The gathering of latent vectors over context ranks in a layer; None if there is none."""
    m = step.dimensions
    if m.latent is None or not context.layout.gathers_latents:
        return None
    return context_plans(context, step).gatherings[m.window(layer)]
