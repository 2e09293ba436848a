"""Compare the losses of a run with the unigram entropy of its corpus, and plot the loss curve."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Run the command; returns the exit code."""
    from internlm.utils.entry_point import run_command

    return run_command(run)


def run() -> int:
    """Print the comparison and, with matplotlib, write `loss.png` to the run directory; returns the exit code."""
    from internlm.utils.paths import local_path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=local_path, required=True, help="run directory with metrics.jsonl")
    parser.add_argument("--corpus", type=local_path, required=True, help="corpus.json of tools/prepare_demo_data.py")
    options = parser.parse_args()
    entropy = _read_entropy(options.corpus)
    lines = _read_metrics(options.run_dir / "metrics.jsonl")
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    valid: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("val/") and name.endswith("_loss"):
                valid.setdefault(name.removeprefix("val/").removesuffix("_loss"), []).append((line["step"], value))
    print(f"unigram entropy of the corpus:   {entropy:.3f} nats/token (the loss of token frequencies alone)")
    print(f"training loss, step {losses[0][0]:>6}:      {losses[0][1]:.3f}")
    print(f"training loss, step {losses[-1][0]:>6}:      {losses[-1][1]:.3f}")
    for name, points in valid.items():
        print(f"loss on held-out '{name}', step {points[-1][0]}: {points[-1][1]:.3f}")
    _draw(options.run_dir / "loss.png", losses, valid, entropy)
    best = min(points[-1][1] for points in valid.values()) if valid else losses[-1][1]
    if best >= entropy:
        print(f"error: the loss {best:.3f} is not below the unigram entropy {entropy:.3f}", file=sys.stderr)
        return 1
    return 0


def _read_entropy(path: Path) -> float:
    from internlm.utils.errors import DataError
    from internlm.utils.json_text import json_object
    from internlm.utils.storage import storage_path

    try:
        return float(json_object(storage_path(path).read_bytes())["unigram_entropy"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not written by tools/prepare_demo_data.py: {error!r}") from None


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics file, at least one of which has a loss."""
    from internlm.utils.errors import DataError
    from internlm.utils.json_text import json_object
    from internlm.utils.storage import storage_path

    lines = []
    for number, text in enumerate(storage_path(path).read_bytes().splitlines(), start=1):
        try:
            lines.append(json_object(text))
        except ValueError as error:
            raise DataError(f"{path}: line {number} is damaged: {error}") from None
    if not any("loss" in line for line in lines):
        raise DataError(f"{path}: no step has a loss; check that the run has trained")
    return lines


def _draw(
    path: Path, losses: list[tuple[int, float]], valid: dict[str, list[tuple[int, float]]], entropy: float
) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*losses, strict=True), linewidth=1, label="training")
    for name, points in valid.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=f"held out: {name}")
    axes.axhline(entropy, linestyle="--", color="gray", label="unigram entropy of the corpus")
    axes.set(xlabel="step", ylabel="loss, nats/token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(f"loss curve: {path}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
