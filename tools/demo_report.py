"""What a run has learned: its losses beside the unigram entropy of its corpus, and a picture of the curve."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Print the comparison; with matplotlib, draw `loss.png` into the run directory."""
    from internlm.utils.paths import local_path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=local_path, required=True)
    parser.add_argument("--corpus", type=local_path, required=True, help="corpus.json of tools/prepare_demo_data.py")
    options = parser.parse_args()
    entropy = json.loads(options.corpus.read_text(encoding="utf-8"))["unigram_entropy"]
    with (options.run_dir / "metrics.jsonl").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    valid: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("val/") and name.endswith("_loss"):
                valid.setdefault(name.removeprefix("val/").removesuffix("_loss"), []).append((line["step"], value))
    print(f"unigram entropy of the corpus:   {entropy:.3f} nats a token (what counting tokens alone can reach)")
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
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    print(f"curve: {path}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
