"""The layout of a run as JSON: tables, and the actions of a step with their times."""

from __future__ import annotations

from typing import Any

from internlm.core.scheduler.simulator import simulate
from internlm.core.scheduler.timeline import Timeline
from internlm.core.scheduler.timeline_drawing import NAMES
from internlm.initialize.build import build_layout
from internlm.initialize.layout_report import LayoutTable, ends, group_tables, stage_table
from internlm.initialize.stages import build_pipeline_schedule
from internlm.monitor.run_file import StartedRun


def describe_layout(run: StartedRun, rank: int) -> dict[str, Any]:
    """What `internlm layout` prints.

    Args:
        run: a run.
        rank: whose groups are shown.

    Raises:
        ConfigError: the model cannot be cut into these stages.
    """
    config = run.config
    layout = build_layout(config, run.world_size)
    schedule = build_pipeline_schedule(config)(config.data.micro_num)
    tables = [*group_tables(layout, rank), stage_table(config, layout, schedule, rank)]
    return {
        "title": f"{config.JOB_NAME}: {config.model_type} on {run.world_size:,} rank(s)",
        "world_size": run.world_size,
        "rank": rank,
        "tables": [_table(table) for table in tables],
        "timeline": _timeline(simulate(schedule)),
    }


def _table(table: LayoutTable) -> dict[str, Any]:
    return {"title": table.title, "rows": table.rows, "alignment": table.alignment, "notes": table.notes}


def _timeline(timeline: Timeline) -> dict[str, Any]:
    """The timeline; the middle ranks of a deep pipeline are left out, as in the tables."""
    schedule = timeline.schedule
    num_ranks, num_chunks = schedule.placement.num_ranks, schedule.placement.num_chunks
    return {
        "name": schedule.name,
        "num_ranks": num_ranks,
        "num_chunks": num_chunks,
        "num_micro_batches": schedule.num_micro_batches,
        "bubble": timeline.bubble(),
        "end": timeline.end,
        "kinds": {kind.value: name for kind, name in NAMES.items()},
        "rows": [
            {
                "rank": rank,
                "bubble": timeline.bubble(rank),
                "peak_live": timeline.peak_live(rank) / num_chunks,
                "actions": [
                    [event.start, event.end, event.action.kind.value, event.action.micro_batch, event.action.chunk]
                    for event in timeline.events[rank]
                ],
            }
            for rank in ends(range(num_ranks))
        ],
    }
