"""Print the loss by position of one or several runs, before and after training, and plot it.

    python tools/loss_by_position.py yarn=runs/yarn linear=runs/linear --plot loss_by_position.svg

The runs have `data.valid_by_position = True`; with `data.valid_at_start = True`, their first evaluation is of the
weights that they started from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Curve = dict[str, float]
"""Positions, such as "256-511" -> mean loss."""


def main() -> int:
    """Run the command; returns the exit code."""
    from internlm.utils.entry_point import run_command

    return run_command(run)


def run(arguments: Sequence[str] | None = None) -> int:
    """Print one table of the first evaluations and one of the last; with `--plot`, draw both; returns the exit code."""
    from internlm.utils.paths import local_path

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="+", metavar="NAME=DIR", help="run directories with metrics.jsonl, and their names"
    )
    parser.add_argument("--set", help="validation set (default: the only one)")
    parser.add_argument("--plot", type=local_path, help="file of the plot, such as loss.svg; needs matplotlib")
    parser.add_argument("--titles", nargs=2, default=("first evaluation", "last evaluation"), help="of the two plots")
    options = parser.parse_args(arguments)
    first: dict[str, Curve] = {}
    last: dict[str, Curve] = {}
    for text in options.runs:
        name, _, folder = text.rpartition("=")
        curves = read_curves(Path(folder) / "metrics.jsonl", options.set)
        first[name or folder], last[name or folder] = curves[0], curves[-1]
    for title, curves_of in zip(options.titles, (first, last), strict=True):
        print(f"{title}\n\n{table(curves_of)}\n")
    if options.plot is not None:
        draw(options.plot, dict(zip(options.titles, (first, last), strict=True)))
    return 0


def read_curves(path: Path, set_name: str | None) -> list[Curve]:
    """The curve of each evaluation of a validation set, in the order of steps.

    Raises:
        DataError: the file is damaged, has no loss by position, or has several sets and none is named.
    """
    from internlm.utils.errors import DataError
    from internlm.utils.json_text import json_object
    from internlm.utils.storage import storage_path

    curves: dict[str, list[Curve]] = {}
    for number, text in enumerate(storage_path(path).read_bytes().splitlines(), start=1):
        try:
            line: dict[str, Any] = json_object(text)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is damaged: {error}") from None
        found: dict[str, Curve] = {}
        for name, value in line.items():
            before, kind, positions = name.partition("_loss_by_position/")
            if kind and value is not None:
                found.setdefault(before.removeprefix("val/"), {})[positions] = value
        for name, curve in found.items():
            curves.setdefault(name, []).append(curve)
    known = ", ".join(curves)
    if not curves:
        raise DataError(f"{path}: no evaluation has the loss by position; set data.valid_by_position = True")
    if set_name is None and len(curves) > 1:
        raise DataError(f"{path}: there are several validation sets: {known}; choose one with --set")
    if set_name is not None and set_name not in curves:
        raise DataError(f"{path}: no validation set is named '{set_name}'; there are: {known}")
    return curves[set_name or known]


def table(curves: dict[str, Curve]) -> str:
    """The curves as a table of Markdown, one column for each."""
    rows = [f"| positions | {' | '.join(curves)} |", "|---" * (len(curves) + 1) + "|"]
    for positions in _all_positions(curves):
        cells = (f"{curve[positions]:.3f}" if positions in curve else "" for curve in curves.values())
        rows.append(f"| {positions} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(path: Path, panels: dict[str, dict[str, Curve]]) -> None:
    """One plot beside the other, with a line for each curve.

    Raises:
        DataError: matplotlib is not installed.
    """
    from internlm.utils.errors import DataError

    try:
        import matplotlib
    except ImportError:
        raise DataError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    # Text as text, and no date: a small file, the same for the same numbers.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "loss_by_position"})
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(10, 4), layout="constrained", sharey=True)
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        labels = _all_positions(curves)
        for name, curve in curves.items():
            known = [positions for positions in labels if positions in curve]
            places = [labels.index(positions) for positions in known]
            axes.plot(places, [curve[positions] for positions in known], marker="o", markersize=3, label=name)
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set(title=title, xlabel="position in the document")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("loss, nats/token")
    all_axes[-1].legend()
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"plot: {path}")


def _all_positions(curves: dict[str, Curve]) -> list[str]:
    names = {positions for curve in curves.values() for positions in curve}
    return sorted(names, key=lambda positions: int(positions.partition("-")[0]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
