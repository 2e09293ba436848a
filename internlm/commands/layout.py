"""`internlm layout`: shows the groups of the ranks, the stages of the model, and the timeline of a step.

Everything is computed from the config in a single process, for any number of ranks.
"""

from __future__ import annotations

import argparse
import shutil

from internlm.commands.config_options import add_config_options
from internlm.config.loader import load_config
from internlm.core.scheduler.simulator import simulate
from internlm.core.scheduler.timeline import Timeline
from internlm.core.scheduler.timeline_drawing import draw_png, draw_text
from internlm.initialize.build import build_layout, check_buildable
from internlm.initialize.layout_report import MAX_ROWS, ends, group_tables, stage_table
from internlm.initialize.stages import build_meta_model, build_pipeline_schedule, parameter_groups
from internlm.initialize.vision_costs import describe_vision
from internlm.model.llava.model import Llava
from internlm.utils.errors import UserError
from internlm.utils.paths import local_path

MIN_WIDTH = 20


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
    for table in (*group_tables(layout, options.rank), stage_table(config, layout, schedule, options.rank)):
        print(table.text())
    if config.model_type == "LLAVA":
        model = build_meta_model(config)
        assert isinstance(model, Llava)
        print(f"{describe_vision(model, parameter_groups(config), config.data.seq_len)}\n")
    print(describe_step(timeline, width))
    if options.png is not None:
        draw_png(timeline, options.png)
        print(f"\nimage: {options.png}")
    return 0


def describe_step(timeline: Timeline, width: int) -> str:
    """The timeline of one step, its bubble, and the peak number of live micro-batches."""
    schedule = timeline.schedule
    num_ranks, num_chunks = schedule.placement.num_ranks, schedule.placement.num_chunks
    shown = [f"{timeline.peak_live(rank) / num_chunks:g}" for rank in ends(range(num_ranks))]
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
