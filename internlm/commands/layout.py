"""`internlm layout`: shows the groups of the ranks, the stages of the model, and the timeline of a step.

Everything is computed from the config in a single process, for any number of ranks.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
from collections.abc import Sequence

from internlm.commands.config_options import add_config_options
from internlm.config.loader import load_config
from internlm.config.schema import Config
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.rank_view import RankView
from internlm.core.scheduler.schedules import PipelineSchedule
from internlm.core.scheduler.simulator import simulate
from internlm.core.scheduler.timeline import Timeline
from internlm.core.scheduler.timeline_drawing import draw_png, draw_text
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.expert_layers import RoutedTokens, exchanged_rows_sent, gathered_experts_sent
from internlm.initialize.activation_memory import estimated_architecture
from internlm.initialize.build import build_layout, check_buildable
from internlm.initialize.context_options import tokens_per_rank
from internlm.initialize.rank_estimates import RankEstimate, estimate_ranks
from internlm.initialize.stages import build_meta_model, build_pipeline_schedule, parameter_groups, reduce_dtype
from internlm.initialize.vision_costs import describe_vision
from internlm.model.llava.model import Llava
from internlm.utils.errors import UserError
from internlm.utils.paths import local_path
from internlm.utils.text_table import text_table

MIN_WIDTH = 20

MAX_ROWS = 16
"""Maximum number of rows of a table; the middle of a longer one is omitted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_options(parser)
    parser.add_argument("--world-size", required=True, type=int, metavar="N", help="number of ranks")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="the rank whose groups are shown (default: 0)")
    parser.add_argument(
        "--png", type=local_path, metavar="FILE", help="also draw the timeline of a step into this file"
    )
    parser.add_argument("--width", type=int, metavar="N", help="characters per line (default: width of the terminal)")


def run(options: argparse.Namespace) -> int:
    """Print the layout; returns the exit code."""
    if options.world_size < 1:
        raise UserError(f"--world-size {options.world_size}: must be at least 1")
    if not 0 <= options.rank < options.world_size:
        raise UserError(f"--rank {options.rank}: must be from 0 to {options.world_size - 1}")
    if options.width is not None and options.width < MIN_WIDTH:
        raise UserError(f"--width {options.width}: must be at least {MIN_WIDTH}")
    config = load_config(options.config, options.overrides, world_size=options.world_size).config
    check_buildable(config, options.world_size)
    layout = build_layout(config, options.world_size)
    schedule = build_pipeline_schedule(config)(config.data.micro_num)
    timeline = simulate(schedule)
    width = options.width or shutil.get_terminal_size((120, 0)).columns
    print(f"{config.JOB_NAME}: {config.model_type} on {options.world_size:,} rank(s)\n")
    print(describe_groups(layout, options.rank))
    print(describe_stages(config, layout, schedule, options.rank))
    if config.model_type == "LLAVA":
        model = build_meta_model(config)
        assert isinstance(model, Llava)
        print(f"{describe_vision(model, parameter_groups(config), config.data.seq_len)}\n")
    print(describe_step(timeline, width))
    if options.png is not None:
        draw_png(timeline, options.png)
        print(f"\nimage: {options.png}")
    return 0


def describe_groups(layout: ParallelLayout, rank: int) -> str:
    """Tables of the axes of each view, with the groups of one rank; an axis that an earlier view has too is omitted."""
    lines = []
    shown: set[tuple[str, tuple[int, ...]]] = set()
    for view in layout.views:
        axes = [axis for axis in _shown_axes(view) if (axis, view.group(axis, rank)) not in shown]
        shown.update((axis, view.group(axis, rank)) for axis in axes)
        indices = [f"{axis} {index}" for axis, index in view.coordinate(rank).items() if view.size(axis) > 1]
        position = f"; rank {rank} is at {', '.join(indices)}" if indices else ""
        lines.append(f"{view.name} view, outermost axis first{position}")
        rows = [_axis_row(view, axis, rank) for axis in axes]
        if rows:
            lines += text_table([("axis", "ranks", "groups", f"group of rank {rank}"), *rows], "<>><")
        lines.append("")
    return "\n".join(lines)


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


def describe_stages(config: Config, layout: ParallelLayout, schedule: PipelineSchedule, rank: int) -> str:
    """Table of layers, parameters and memory by pipeline rank; activations and traffic of one rank."""
    placement = schedule.placement
    pipeline = layout.activation.group("pipeline", rank)
    shown = _ends(range(placement.num_ranks))
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
    lines = [title, *_stage_table(head, rows, placement.num_ranks, "><<"), ""]

    estimate = estimate_ranks(config, layout, schedule, [rank])[0]
    parts = (
        _describe_context(estimate, rank),
        _describe_experts(config, layout, rank),
        _describe_traffic(rank, estimate),
    )
    return "\n".join([*lines, *itertools.chain(*parts)])


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


def _stage_table(head: list[str], rows: list[tuple[str, ...]], num_ranks: int, align: str) -> list[str]:
    """A table with one row per pipeline rank, and a row of dots where ranks are omitted."""
    table = [tuple(head), *rows]
    if len(rows) < num_ranks:
        table.insert(1 + len(rows) // 2, ("..",) * len(head))
    return text_table(table, align + ">" * (len(head) - len(align)))


def _layers(estimate: RankEstimate) -> str:
    parameters = estimate.parameters
    parts = ["embedding"] if parameters.has_embedding else []
    parts += [format_ranks(layers) for layers in parameters.layers]
    return " + ".join([*parts, "head"] if parameters.has_head else parts)


def describe_step(timeline: Timeline, width: int) -> str:
    """The timeline of one step, its bubble, and the peak number of live micro-batches."""
    schedule = timeline.schedule
    num_ranks, num_chunks = schedule.placement.num_ranks, schedule.placement.num_chunks
    shown = [f"{timeline.peak_live(rank) / num_chunks:g}" for rank in _ends(range(num_ranks))]
    if len(shown) < num_ranks:
        shown.insert(len(shown) // 2, "..")
    lines = [
        f"step: {schedule.name}, {schedule.num_micro_batches} micro-batch(es), {timeline.bubble():.1%} bubble",
        f"peak number of live micro-batches, by pipeline rank: {' '.join(shown)}",
        "F forward, B backward, I input gradients, W weight gradients; each takes one column, B two"
        + ("; a, b .. are the chunks of a rank" if num_chunks > 1 else ""),
        draw_text(timeline, width, MAX_ROWS),
    ]
    return "\n".join(lines)


def _ends(numbers: Sequence[int]) -> list[int]:
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
