"""Draws the timeline of a schedule, as text or as a PNG image."""

from __future__ import annotations

from pathlib import Path

from internlm.core.scheduler.actions import Action, ActionKind
from internlm.core.scheduler.timeline import Timeline
from internlm.utils.errors import UserError

COLORS = {
    ActionKind.FORWARD: "#4c78a8",
    ActionKind.BACKWARD: "#59a14f",
    ActionKind.BACKWARD_INPUT: "#76b7b2",
    ActionKind.BACKWARD_WEIGHT: "#f2b447",
}
NAMES = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "backward",
    ActionKind.BACKWARD_INPUT: "backward of the input",
    ActionKind.BACKWARD_WEIGHT: "backward of the weights",
}
ELLIPSIS = " .. "
"""Replaces the omitted part of a row."""

MAX_NUMBERED = 160
"""Units of time up to which an image has room for micro-batch numbers."""


def label(action: Action, num_chunks: int) -> str:
    """A short label such as "F12", or "F12b" for the second of several chunks."""
    chunk = chr(ord("a") + action.chunk) if num_chunks > 1 else ""
    return f"{action.kind.value}{action.micro_batch}{chunk}"


def draw_text(timeline: Timeline, width: int | None = None, max_ranks: int = 16) -> str:
    """One row per rank, one column per unit of time; an action of several units is extended with "-".

    Args:
        timeline: its times are integers.
        width: maximum characters of a row; the middle of a longer step is omitted. None: no limit.
        max_ranks: maximum rows; the middle of a deeper pipeline is omitted.
    """
    num_chunks = timeline.schedule.placement.num_chunks
    cell = 1 + max(len(label(event.action, num_chunks)) for row in timeline.events for event in row)
    rows = []
    for rank, events in enumerate(timeline.events):
        line = ""
        for event in events:
            units = round(event.end - event.start)
            text = label(event.action, num_chunks).ljust(units * cell - 1, "-" if units > 1 else " ")
            line = line.ljust(round(event.start) * cell) + text + " "
        rows.append((f"rank {rank}", line))
    margin = max(len(head) for head, _ in rows) + 2
    if width is not None:
        rows = [(head, _shorten(line, width - margin, cell, round(timeline.end) * cell)) for head, line in rows]
    lines = [head.ljust(margin) + line.rstrip() for head, line in rows]
    if len(lines) > max_ranks:
        half = max_ranks // 2
        lines = [*lines[:half], ELLIPSIS.strip().ljust(margin), *lines[-half:]]
    return "\n".join(lines)


def _shorten(line: str, room: int, cell: int, full: int) -> str:
    """The first and last cells of a line of `full` characters that fit into `room`; the same cells in every line."""
    if full <= room + 1:
        return line
    cells = max((room + 1 - len(ELLIPSIS)) // cell, 2)
    left, right = (cells + 1) // 2 * cell, cells // 2 * cell
    line = line.ljust(full)
    return line[:left].rstrip().ljust(left - 1) + ELLIPSIS + line[-right:]


def draw_png(timeline: Timeline, path: Path) -> None:
    """Write the timeline as a PNG image: one row per rank, one color per kind of action, paler for later chunks.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise UserError(f"{path}: an image needs matplotlib, which is not installed: pip install matplotlib") from None
    schedule = timeline.schedule
    num_ranks, num_chunks = schedule.placement.num_ranks, schedule.placement.num_chunks
    units = timeline.end
    figure = Figure(figsize=(min(max(units * 0.3, 6), 40), 1.2 + 0.4 * num_ranks), layout="constrained")
    axes = figure.subplots()
    for rank, events in enumerate(timeline.events):
        # One collection per color: a separate patch for each action takes seconds.
        bars: dict[tuple[ActionKind, int], list[tuple[float, float]]] = {}
        for start, end, action in events:
            bars.setdefault((action.kind, action.chunk), []).append((start, end - start))
            if units <= MAX_NUMBERED:
                axes.text((start + end) / 2, rank, str(action.micro_batch), ha="center", va="center", fontsize=7)
        for (kind, chunk), spans in bars.items():
            opacity = 1 - 0.6 * chunk / num_chunks
            axes.broken_barh(spans, (rank - 0.45, 0.9), facecolor=COLORS[kind], alpha=opacity, edgecolor="white")
    axes.set(
        xlim=(0, units), ylim=(num_ranks - 0.5, -0.5), yticks=range(num_ranks), xlabel="time", ylabel="rank",
        title=f"{schedule.name}: {schedule.num_micro_batches} micro-batches, {timeline.bubble():.1%} bubble",
    )  # fmt: skip
    kinds = sorted({event.action.kind for row in timeline.events for event in row}, key=list(COLORS).index)
    handles = [Patch(color=COLORS[kind], label=NAMES[kind]) for kind in kinds]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"{path}: the image cannot be written: {error.strerror}") from None
