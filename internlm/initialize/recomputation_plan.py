"""Plans the save policies of a rank's layers, so that the activations of one micro-batch fit a budget in bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from internlm.estimate.activations import LayerActivations
from internlm.model.recompute import SAVE_POLICIES, SavePolicy
from internlm.utils.errors import ConfigError

_GIB = 2**30
_NAMES: dict[SavePolicy, str] = {
    "nothing": "save only their input",
    "attention": "save attention",
    "matmuls": "save GEMM outputs",
    "everything": "recompute nothing",
}


@dataclass(frozen=True)
class ActivationPlan:
    """Save policies of a rank's layers, with their cost.

    Attributes:
        policies: layer -> save policy.
        saved_bytes: bytes that these layers save for one micro-batch.
        budget: upper limit of `saved_bytes`.
        recomputed_flops: FLOPs that backward recomputes for one micro-batch.
    """

    policies: dict[int, SavePolicy]
    saved_bytes: float
    budget: float
    recomputed_flops: float

    def __str__(self) -> str:
        """A summary of one line, for the log."""
        counts = Counter(self.policies.values())
        parts = ", ".join(f"{counts[policy]} {_NAMES[policy]}" for policy in reversed(SAVE_POLICIES) if counts[policy])
        return (
            f"of {len(self.policies)} layers {parts}; {self.saved_bytes / _GIB:.3g} of {self.budget / _GIB:.3g} GiB "
            f"saved and {self.recomputed_flops / 1e12:.3g} TFLOP recomputed per micro-batch"
        )


def plan_activations(activations: LayerActivations, layers: Sequence[int], budget: float) -> ActivationPlan:
    """Find the plan with the fewest recomputed FLOPs; ties go to the plan with the fewest recomputed layers.

    All layers save the same number of bytes under one policy, and differ in FLOPs only by their attention window. So
    the search enumerates the number of layers per policy. The first layers recompute the most.

    Args:
        activations: of one layer.
        layers: layers of this rank.
        budget: bytes that these layers may save for one micro-batch.

    Raises:
        ConfigError: the activations exceed the budget even if every layer saves only its input.
    """
    saved = [activations.saved_bytes(policy) for policy in SAVE_POLICIES]
    least = saved[-1] * len(layers)
    if least > budget:
        raise ConfigError(
            f"model.checkpoint_budget = {budget / _GIB:g}: a rank with {len(layers)} layers saves {least / _GIB:.3g} "
            "GiB per micro-batch even with full recomputation; raise the budget to at least that, reduce "
            "data.micro_bsz or data.seq_len, or split the sequence (parallel.tensor) or the layers (parallel.pipeline) "
            "over more ranks"
        )

    def full_flops(layer: int) -> float:
        """FLOPs to recompute a layer that saves only its input."""
        return activations.recomputed_flops("nothing", activations.dimensions.window(layer))

    # Layers with cheap attention recompute it first.
    by_cost = sorted(layers, key=full_flops)
    full_flops_of_first = [0.0]
    for layer in by_cost:
        full_flops_of_first.append(full_flops_of_first[-1] + full_flops(layer))
    gemm_flops = activations.recomputed_flops("attention", None)
    best: tuple[float, int, int, int] | None = None
    for nothing in range(len(layers) + 1):
        for attention in range(len(layers) - nothing + 1):
            remaining = len(layers) - nothing - attention
            spare = budget - nothing * saved[3] - attention * saved[2] - remaining * saved[1]
            if spare < 0:
                continue
            # Of the remaining layers, as many as fit recompute nothing.
            extra = saved[0] - saved[1]
            everything = remaining if extra <= 0 else min(remaining, int(spare / extra))
            matmuls = remaining - everything
            flops = full_flops_of_first[nothing] + attention * gemm_flops
            candidate = (flops, nothing + attention + matmuls, nothing, attention)
            if best is None or candidate < best:
                best = candidate
    assert best is not None
    flops, recomputed, nothing, attention = best
    numbers = (len(layers) - recomputed, recomputed - nothing - attention, attention, nothing)
    chosen = [
        policy for policy, number in reversed(list(zip(SAVE_POLICIES, numbers, strict=True))) for _ in range(number)
    ]
    policies = dict(zip(by_cost, chosen, strict=True))
    total = sum(saved[SAVE_POLICIES.index(policy)] for policy in chosen)
    return ActivationPlan({layer: policies[layer] for layer in layers}, total, budget, flops)
