"""Which layers of a rank recompute how much, so that a micro batch's activations fit into a number of bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from internlm.estimate.activations import LayerSizes
from internlm.model.recompute import KEEPS, SavePolicy
from internlm.utils.errors import ConfigError

_GIB = 2**30
_NAMES: dict[SavePolicy, str] = {
    "nothing": "recompute all",
    "attention": "keep attention",
    "matmuls": "keep products",
    "everything": "recompute nothing",
}


@dataclass(frozen=True)
class ActivationPlan:
    """What each layer of a rank keeps.

    Attributes:
        keeps: layer -> policy.
        kept_bytes: of one micro batch in all of these layers.
        budget: bytes that it may be.
        flops_again: floating-point operations of matrix products that run a second time, of one micro batch.
    """

    keeps: dict[int, SavePolicy]
    kept_bytes: float
    budget: float
    flops_again: float

    def __str__(self) -> str:
        """One line for people."""
        counts = Counter(self.keeps.values())
        parts = ", ".join(f"{counts[keep]} {_NAMES[keep]}" for keep in reversed(KEEPS) if counts[keep])
        return (
            f"of {len(self.keeps)} layers {parts}; they keep {self.kept_bytes / _GIB:.3g} of {self.budget / _GIB:.3g} "
            f"GiB a micro-batch and compute {self.flops_again / 1e12:.3g} TFLOP again"
        )


def plan_activations(sizes: LayerSizes, layers: Sequence[int], budget: float) -> ActivationPlan:
    """The plan with the fewest operations run twice, and of those the one that recomputes the fewest layers.

    All layers keep the same under one policy, and only windows make them differ in what they compute: so the numbers of
    layers under each policy decide, and all of them are tried. The first layers recompute the most.

    Args:
        sizes: of a layer.
        layers: of this rank.
        budget: bytes of one micro batch in all of them.

    Raises:
        ConfigError: it does not fit even if every layer keeps its input alone.
    """
    kept = [sizes.kept_bytes(keep) for keep in KEEPS]
    least = kept[-1] * len(layers)
    if least > budget:
        raise ConfigError(
            f"model.checkpoint_budget = {budget / _GIB:g}: a rank with {len(layers)} layers keeps {least / _GIB:.3g} "
            "GiB of a micro-batch even if it recomputes all that can be; give at least that, or make data.micro_bsz or "
            "data.seq_len smaller, or split the sequence (parallel.tensor) or the layers (parallel.pipeline) over more "
            "ranks"
        )
    windows = sizes.architecture.windows
    # Layers whose attention is cheap are the first to run it again.
    by_cost = sorted(layers, key=lambda layer: sizes.flops_again("nothing", windows[layer]))
    all_again = [0.0]
    for layer in by_cost:
        all_again.append(all_again[-1] + sizes.flops_again("nothing", windows[layer]))
    products_again = sizes.flops_again("attention", None)
    best: tuple[float, int, int, int] | None = None
    for nothing in range(len(layers) + 1):
        for attention in range(len(layers) - nothing + 1):
            left = len(layers) - nothing - attention
            spare = budget - nothing * kept[3] - attention * kept[2] - left * kept[1]
            if spare < 0:
                continue
            # Of the rest, as many as fit recompute nothing at all.
            more = kept[0] - kept[1]
            everything = left if more <= 0 else min(left, int(spare / more))
            matmuls = left - everything
            again = all_again[nothing] + attention * products_again
            candidate = (again, nothing + attention + matmuls, nothing, attention)
            if best is None or candidate < best:
                best = candidate
    assert best is not None
    again, recomputed, nothing, attention = best
    numbers = (len(layers) - recomputed, recomputed - nothing - attention, attention, nothing)
    policies = [keep for keep, number in reversed(list(zip(KEEPS, numbers, strict=True))) for _ in range(number)]
    keeps = dict(zip(by_cost, policies, strict=True))
    total = sum(kept[KEEPS.index(keep)] for keep in policies)
    return ActivationPlan({layer: keeps[layer] for layer in layers}, total, budget, again)
