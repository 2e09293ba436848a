"""The groups of the ranks and the stages of a model, as tables with notes.

`internlm layout` prints them, and the page of a run shows them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from internlm.config.schema import Config
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.rank_view import RankView
from internlm.core.scheduler.schedules import PipelineSchedule
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.expert_layers import RoutedTokens, exchanged_rows_sent, gathered_experts_sent
from internlm.initialize.activation_memory import estimated_architecture
from internlm.initialize.context_options import tokens_per_rank
from internlm.initialize.rank_estimates import RankEstimate, estimate_ranks
from internlm.initialize.stages import build_meta_model, reduce_dtype
from internlm.utils.text_table import text_table

MAX_ROWS = 16
"""Maximum number of rows of a table; the middle of a longer one is omitted."""


@dataclass(frozen=True)
class LayoutTable:
    """A table about a layout.

    Attributes:
        title: what it shows.
        rows: cells; the first row is the header. Empty if there is nothing to show.
        alignment: for each column, "<" (left) or ">" (right).
        notes: lines below the table; an empty one ends a paragraph.
    """

    title: str
    rows: Sequence[tuple[str, ...]]
    alignment: str
    notes: Sequence[str] = ()

    def text(self) -> str:
        """As plain text that ends with an empty line."""
        table = text_table(self.rows, self.alignment) if self.rows else []
        return "\n".join([self.title, *table, "", *self.notes])


def group_tables(layout: ParallelLayout, rank: int) -> list[LayoutTable]:
    """The axes of each view, with the groups of one rank; an axis that an earlier view has too is omitted."""
    tables = []
    shown: set[tuple[str, tuple[int, ...]]] = set()
    for view in layout.views:
        axes = [axis for axis in _shown_axes(view) if (axis, view.group(axis, rank)) not in shown]
        shown.update((axis, view.group(axis, rank)) for axis in axes)
        indices = [f"{axis} {index}" for axis, index in view.coordinate(rank).items() if view.size(axis) > 1]
        position = f"; rank {rank} is at {', '.join(indices)}" if indices else ""
        title = f"{view.name} view, outermost axis first{position}"
        rows = [_axis_row(view, axis, rank) for axis in axes]
        head = ("axis", "ranks", "groups", f"group of rank {rank}")
        tables.append(LayoutTable(title, [head, *rows] if rows else [], "<>><"))
    return tables


def _shown_axes(view: RankView) -> list[str]:
    """The axes of more than one rank, a merged axis before its parts; `sample` only if it merges two of them."""
    names: list[str] = []
    for axis in view.axes:
        names += [name for name, parts in view.merged.items() if parts[0] == axis] + [axis]
    shown = [name for name in names if view.size(name) > 1]
    return [name for name in shown if name != "sample" or {"context", "tensor"} <= {*shown}]


def _axis_row(view: RankView, axis: str, rank: int) -> tuple[str, ...]:
    num_groups = view.world_size // view.size(axis)
    return axis, f"{view.size(axis):,}", f"{num_groups:,}", format_ranks(view.group(axis, rank))


def stage_table(config: Config, layout: ParallelLayout, schedule: PipelineSchedule, rank: int) -> LayoutTable:
    """Layers, parameters and memory by pipeline rank, with notes on activations and traffic of one rank."""
    placement = schedule.placement
    pipeline = layout.activation.group("pipeline", rank)
    shown = ends(range(placement.num_ranks))
    estimates = estimate_ranks(config, layout, schedule, [pipeline[index] for index in shown])
    is_offloaded = config.hybrid_zero_optimizer.offload_optimizer
    width = layout.world_size // placement.num_ranks
    # The pipeline is the outermost axis, so the ranks at one index of it are consecutive.
    ranks = [format_ranks(range(index * width, (index + 1) * width)) for index in shown]

    head = ["", "ranks", "layers", "parameters", "weights", "gradients", "fp32 masters", "moments", "total"]
    rows = []
    for index, own_ranks, estimate in zip(shown, ranks, estimates, strict=True):
        m = estimate.memory
        sizes = [m.weights, m.gradients, m.masters, m.moments, m.all_bytes, *([m.host] if is_offloaded else [])]
        rows.append((str(index), own_ranks, _layers(estimate), f"{m.parameters:,}", *map(_bytes, sizes)))
    head += ["on the host"] if is_offloaded else []
    title = (
        f"pipeline: {placement.num_ranks} rank(s) of {placement.num_chunks} stage(s); "
        f"parameters and bytes of ranks {format_ranks(pipeline)}"
    )
    table = [tuple(head), *rows]
    if len(rows) < placement.num_ranks:
        table.insert(1 + len(rows) // 2, ("..",) * len(head))

    estimate = estimate_ranks(config, layout, schedule, [rank])[0]
    parts = (
        _describe_context(estimate, rank),
        _describe_experts(config, layout, rank),
        _describe_traffic(rank, estimate),
    )
    return LayoutTable(title, table, "><<" + ">" * (len(head) - 3), [*itertools.chain(*parts)])


def _describe_context(estimate: RankEstimate, rank: int) -> list[str]:
    """How context ranks share a sample: cut, balance of attention, and messages of a layer."""
    if estimate.context is None:
        return []
    cut, pieces, plans, gatherings = estimate.context
    lines = [
        f"context: {cut.num_ranks} ranks with {cut.tokens_per_rank:,} tokens each of a sample of one document a row, "
        f"cut {cut.name}"
    ]
    own: dict[int | None, str] = {}
    for window, plan in plans.items():
        hops = sum(bool(step.key_receives) for step in plan.steps)
        tiles = sum(len(each.tiles) for step in plan.steps for each in step.computations)
        own[window] = f"{tiles:,} tiles and waits for {hops} hops"
    for window, gathering in gatherings.items():
        own[window] = f"{len(gathering.tiles):,} tiles over latent vectors of {gathering.num_rows:,} tokens"
    for window, work in own.items():
        pairs, _ = pieces.work(window)
        name = "full attention" if window is None else f"a window of {window:,}"
        slowest = f"the slowest rank computes {pairs.max() / pairs.mean():.2f} of the mean"
        lines.append(f"{name}: {slowest}; rank {rank} computes {work}")
    return [*lines, ""]


def _describe_experts(config: Config, layout: ParallelLayout, rank: int) -> list[str]:
    """Experts and rows of a rank, and which costs fewer bytes: sending rows, or gathering weights."""
    architecture = estimated_architecture(build_meta_model(config))
    if architecture is None or architecture.experts is None:
        return []
    dimensions, experts = ModelDimensions.of(architecture), architecture.experts
    form, num_layers = experts.form, len(experts.layers(architecture.num_layers))
    tokens = tokens_per_rank(config.data, layout)
    routed = RoutedTokens.of(dimensions, layout, tokens)
    lines = [
        f"experts: {form.num_experts} in each of {num_layers} layer(s), {form.num_experts // layout.expert} of them on "
        f"a rank; {form.top_k} for each token",
        f"per layer and micro-batch, rank {rank} routes {routed.tokens:,.0f} tokens, and its experts compute",
        f"{routed.rows:,.0f} rows if all get equally many, at most {routed.most_rows:,.0f}",
    ]
    ranks = layout.expert if layout.expert > 1 else math.gcd(form.num_experts, layout.world_size // layout.pipeline)
    if ranks == 1:
        return [*lines, ""]
    policy = config.model.checkpoint_save_policy if config.model.num_recomputed else "everything"
    own = tokens / layout.tensor
    rows = exchanged_rows_sent(dimensions, form.top_k * own, ranks, policy)
    weights = gathered_experts_sent(dimensions, ranks, policy, reduce_dtype(config).itemsize)
    return [
        *lines,
        f"with experts on {ranks} ranks (parallel.expert), it sends {_bytes(rows)} of rows;",
        f"with gathered ones (parallel.expert_weight, FSDP), {_bytes(weights)} of weights and gradients:",
        f"{'rows' if rows < weights else 'weights'} are fewer bytes here; rows are "
        f"up to {own * weights / rows:,.0f} tokens per rank",
        "",
    ]


def _describe_traffic(rank: int, estimate: RankEstimate) -> list[str]:
    """Peak activation memory, and bytes sent per step by axis; what is unknown about a model's layers."""
    if estimate.sent is None or estimate.activations is None:
        return ["activations and bytes sent are not estimated for the layers of this model", ""]
    worst = []
    if estimate.worst_activations is not None:
        size = _bytes(estimate.worst_activations)
        worst.append(f"if all experts get equally many tokens; {size} if its experts get those of all ranks")
    by_axis = [f"{axis} {_bytes(size)}" for axis, size in vars(estimate.sent).items() if size]
    return [
        f"rank {rank} holds at most {_bytes(estimate.activations)} of activations in its layers",
        *worst,
        f"rank {rank} sends {_bytes(estimate.sent.all_bytes)} per step ({', '.join(by_axis) or 'nothing'})",
        "",
    ]


def _layers(estimate: RankEstimate) -> str:
    parameters = estimate.parameters
    parts = ["embedding"] if parameters.has_embedding else []
    parts += [format_ranks(layers) for layers in parameters.layers]
    return " + ".join([*parts, "head"] if parameters.has_head else parts)


def ends(numbers: Sequence[int]) -> list[int]:
    """The first and last numbers, at most as many as a table has rows."""
    return [*numbers] if len(numbers) <= MAX_ROWS else [*numbers[: MAX_ROWS // 2], *numbers[-MAX_ROWS // 2 :]]


def format_ranks(ranks: Sequence[int]) -> str:
    """Abbreviate a list of ranks, as in `0-7`, `0,8,..,56` or `0-3,8-11,..,24-27`."""
    runs = [[ranks[0], ranks[0]]]
    for number in ranks[1:]:
        if number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ",".join(texts if len(texts) <= 4 else [*texts[:2], "..", texts[-1]])


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"
