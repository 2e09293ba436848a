"""Save policy of each layer of a rank, so that the activations of a micro-batch fit into a number of bytes."""

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
    """Save policy of each layer of a rank.

    Attributes:
        policies: layer -> save policy.
        saved_bytes: bytes that these layers save of one micro-batch.
        budget: upper limit of `saved_bytes`.
        recomputed_flops: FLOPs that backward recomputes for one micro-batch.
    """

    policies: dict[int, SavePolicy]
    saved_bytes: float
    budget: float
    recomputed_flops: float

    def __str__(self) -> str:
        """One line for people."""
        counts = Counter(self.policies.values())
        parts = ", ".join(f"{counts[policy]} {_NAMES[policy]}" for policy in reversed(SAVE_POLICIES) if counts[policy])
        return (
            f"of {len(self.policies)} layers {parts}; {self.saved_bytes / _GIB:.3g} of {self.budget / _GIB:.3g} GiB "
            f"saved and {self.recomputed_flops / 1e12:.3g} TFLOP recomputed per micro-batch"
        )


def plan_activations(activations: LayerActivations, layers: Sequence[int], budget: float) -> ActivationPlan:
    """The plan with the fewest recomputed FLOPs, and among those the one with the fewest recomputed layers.

    Under one policy all layers save the same, and only attention windows make them differ in FLOPs. So a plan is a
    number of layers for each policy, and all of these are tried. The first layers recompute the most.

    Args:
        activations: of a layer.
        layers: layers of this rank.
        budget: bytes that all of them may save of one micro-batch.

    Raises:
        ConfigError: it does not fit even if every layer saves its input alone.
    """
    saved = [activations.saved_bytes(policy) for policy in SAVE_POLICIES]
    least = saved[-1] * len(layers)
    if least > budget:
        raise ConfigError(
            f"model.checkpoint_budget = {budget / _GIB:g}: a rank with {len(layers)} layers saves {least / _GIB:.3g} "
            "GiB of a micro-batch even if it recomputes all that can be; give at least that, or make data.micro_bsz or "
            "data.seq_len smaller, or split the sequence (parallel.tensor) or the layers (parallel.pipeline) over more "
            "ranks"
        )

    def full_flops(layer: int) -> float:
        """FLOPs of a layer that saves its input alone."""
        return activations.recomputed_flops("nothing", activations.dimensions.window(layer))

    # Layers whose attention is cheap are the first to recompute it.
    by_cost = sorted(layers, key=full_flops)
    full_flops_of_first = [0.0]
    for layer in by_cost:
        full_flops_of_first.append(full_flops_of_first[-1] + full_flops(layer))
    gemm_flops = activations.recomputed_flops("attention", None)
    best: tuple[float, int, int, int] | None = None
    for nothing in range(len(layers) + 1):
        for attention in range(len(layers) - nothing + 1):
            left = len(layers) - nothing - attention
            spare = budget - nothing * saved[3] - attention * saved[2] - left * saved[1]
            if spare < 0:
                continue
            # Of the rest, as many as fit recompute nothing at all.
            more = saved[0] - saved[1]
            everything = left if more <= 0 else min(left, int(spare / more))
            matmuls = left - everything
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
