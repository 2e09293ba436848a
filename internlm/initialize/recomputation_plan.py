"""Plans the save policies of a rank's layers, so that the activations of one micro-batch fit a budget in bytes."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    """Find the plan with the fewest recomputed FLOPs; ties go to fewer recomputed layers, then to fewer saved bytes.

    All layers of a kind save the same number of bytes under one policy, and differ in FLOPs only by their attention
    window. So the search enumerates the numbers of layers per policy for each kind, drops those
    that another choice improves, and combines the rest. The first layers recompute the most. Experts count with the
    rows that they have if all get equally many.

    Args:
        activations: of any layer.
        layers: layers of this rank.
        budget: bytes that these layers may save for one micro-batch.

    Raises:
        ConfigError: the activations exceed the budget even if every layer saves only its input.
    """
    by_kind: dict[tuple[float, ...], list[int]] = {}
    for layer in layers:
        of_layer = activations.of(layer)
        costs = *map(of_layer.saved_bytes, SAVE_POLICIES), of_layer.recomputed_flops("attention", None)
        by_kind.setdefault(costs, []).append(layer)
    kinds = [_LayersOfKind.of(activations.of(own[0]), own) for own in by_kind.values()]
    least = sum(kind.least for kind in kinds)
    if least > budget:
        raise ConfigError(
            f"model.checkpoint_budget = {budget / _GIB:g}: a rank with {len(layers)} layers saves {least / _GIB:.3g} "
            "GiB per micro-batch even with full recomputation; raise the budget to at least that, reduce "
            "data.micro_bsz or data.seq_len, or split the sequence (parallel.tensor) or the layers (parallel.pipeline) "
            "over more ranks"
        )
    *others, last = (kind.frontier() for kind in kinds)
    saved_by_last = [choice.saved for choice in last]
    plans = []
    for chosen in itertools.product(*others):
        fitting = bisect.bisect_right(saved_by_last, budget - sum(choice.saved for choice in chosen))
        if fitting:
            plans.append((*chosen, last[fitting - 1]))
    best = min(plans, key=_cost)
    policies = {layer: policy for choice in best for layer, policy in choice.policies.items()}
    saved, flops = sum(choice.saved for choice in best), sum(choice.flops for choice in best)
    return ActivationPlan({layer: policies[layer] for layer in layers}, saved, budget, flops)


def _cost(plan: Sequence[_PolicyCounts]) -> tuple[float, int, float]:
    flops, recomputed = sum(choice.flops for choice in plan), sum(choice.num_recomputed for choice in plan)
    return flops, recomputed, sum(choice.saved for choice in plan)


@dataclass(frozen=True)
class _PolicyCounts:
    """Numbers of layers of a kind under each policy.

    Attributes:
        kind: of the layers.
        numbers: in the order of `SAVE_POLICIES`.
    """

    kind: _LayersOfKind
    numbers: tuple[int, int, int, int]

    @property
    def saved(self) -> float:
        """Bytes that the layers save."""
        return sum(number * saved for number, saved in zip(self.numbers, self.kind.saved, strict=True))

    @property
    def flops(self) -> float:
        """FLOPs that they recompute."""
        _, _, attention, nothing = self.numbers
        return self.kind.full_flops[nothing] + attention * self.kind.gemm_flops

    @property
    def num_recomputed(self) -> int:
        """Layers that recompute anything."""
        return sum(self.numbers[1:])

    @property
    def policies(self) -> dict[int, SavePolicy]:
        """Layer -> policy."""
        in_order = reversed(list(zip(SAVE_POLICIES, self.numbers, strict=True)))
        chosen = [policy for policy, number in in_order for _ in range(number)]
        return dict(zip(self.kind.by_cost, chosen, strict=True))


@dataclass(frozen=True)
class _LayersOfKind:
    """Layers that save the same number of bytes under one policy.

    Attributes:
        saved: bytes of a layer, in the order of `SAVE_POLICIES`.
        by_cost: layers, those with cheap attention first, which recompute it first.
        full_flops: FLOPs to recompute the first n of these from their inputs, by n.
        gemm_flops: FLOPs to recompute a layer except attention.
    """

    saved: tuple[float, ...]
    by_cost: tuple[int, ...]
    full_flops: tuple[float, ...]
    gemm_flops: float

    @classmethod
    def of(cls, activations: LayerActivations, layers: Sequence[int]) -> _LayersOfKind:
        """The kind of these layers.

        Args:
            activations: of each of them.
            layers: their numbers.
        """

        def flops(layer: int) -> float:
            return activations.recomputed_flops("nothing", activations.dimensions.window(layer))

        by_cost = tuple(sorted(layers, key=flops))
        return cls(
            saved=tuple(activations.saved_bytes(policy) for policy in SAVE_POLICIES),
            by_cost=by_cost,
            full_flops=tuple(itertools.accumulate(map(flops, by_cost), initial=0.0)),
            gemm_flops=activations.recomputed_flops("attention", None),
        )

    @property
    def least(self) -> float:
        """Bytes that the layers save at least."""
        return len(self.by_cost) * self.saved[-1]

    def frontier(self) -> list[_PolicyCounts]:
        """All choices than which none both costs less and saves no more bytes, by ascending bytes and falling cost."""
        size = len(self.by_cost)
        numbers = np.indices((size + 1,) * 3).reshape(3, -1)
        nothing, attention, matmuls = numbers[:, numbers.sum(axis=0) <= size]
        recomputed = nothing + attention + matmuls
        by_policy = np.stack([size - recomputed, matmuls, attention, nothing])
        saved = np.array(self.saved) @ by_policy
        flops = np.array(self.full_flops)[nothing] + attention * self.gemm_flops
        rank = np.empty(len(saved), dtype=np.int64)
        rank[np.lexsort((attention, nothing, recomputed, flops))] = np.arange(len(saved))
        order = np.lexsort((rank, saved))
        least = np.minimum.accumulate(rank[order])
        is_cheaper = np.diff(least, prepend=len(saved)) < 0
        return [_PolicyCounts(self, tuple(column)) for column in by_policy[:, order[is_cheaper]].T.tolist()]
