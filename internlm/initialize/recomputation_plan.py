"""Plans the save policies of a rank's layers, so that the activations of one micro-batch fit a budget in bytes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
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

    All layers of a kind, dense or with experts, save the same number of bytes under one policy, and differ in FLOPs
    only by their attention window. So the search enumerates the number of layers per policy and kind. The first layers
    recompute the most. Experts count with the rows that they have if all get equally many.

    Args:
        activations: of any layer.
        layers: layers of this rank.
        budget: bytes that these layers may save for one micro-batch.

    Raises:
        ConfigError: the activations exceed the budget even if every layer saves only its input.
    """
    by_kind: dict[bool, list[int]] = {}
    for layer in layers:
        by_kind.setdefault(activations.dimensions.has_experts(layer), []).append(layer)
    kinds = [_LayersOfKind.of(activations.of(own[0]), own) for own in by_kind.values()]
    least = sum(kind.least for kind in kinds)
    if least > budget:
        raise ConfigError(
            f"model.checkpoint_budget = {budget / _GIB:g}: a rank with {len(layers)} layers saves {least / _GIB:.3g} "
            "GiB per micro-batch even with full recomputation; raise the budget to at least that, reduce "
            "data.micro_bsz or data.seq_len, or split the sequence (parallel.tensor) or the layers (parallel.pipeline) "
            "over more ranks"
        )
    *few, many = sorted(kinds, key=lambda kind: len(kind.by_cost))
    best: tuple[_PolicyCounts, ...] | None = None
    for chosen in itertools.product(*(kind.choices() for kind in few)):
        rest = budget - sum(choice.saved for choice in chosen)
        if rest >= many.least:
            plan = (*chosen, many.best(rest))
            if best is None or _cost(plan) < _cost(best):
                best = plan
    assert best is not None
    policies = {layer: policy for choice in best for layer, policy in choice.policies.items()}
    saved, flops = sum(choice.saved for choice in best), sum(choice.flops for choice in best)
    return ActivationPlan({layer: policies[layer] for layer in layers}, saved, budget, flops)


def _cost(plan: Sequence[_PolicyCounts]) -> tuple[float, int]:
    return sum(choice.flops for choice in plan), sum(choice.num_recomputed for choice in plan)


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

    def choices(self) -> Iterator[_PolicyCounts]:
        """All numbers of layers per policy."""
        size = len(self.by_cost)
        for nothing in range(size + 1):
            for attention in range(size - nothing + 1):
                for matmuls in range(size - nothing - attention + 1):
                    yield _PolicyCounts(self, (size - nothing - attention - matmuls, matmuls, attention, nothing))

    def best(self, budget: float) -> _PolicyCounts:
        """The choice with the fewest recomputed FLOPs, then the fewest recomputed layers, that fits a budget."""
        best: tuple[tuple[float, int, int, int], _PolicyCounts] | None = None
        size, saved = len(self.by_cost), self.saved
        for nothing in range(size + 1):
            for attention in range(size - nothing + 1):
                remaining = size - nothing - attention
                spare = budget - nothing * saved[3] - attention * saved[2] - remaining * saved[1]
                if spare < 0:
                    continue
                # Of the remaining layers, as many as fit recompute nothing.
                extra = saved[0] - saved[1]
                everything = remaining if extra <= 0 else min(remaining, int(spare / extra))
                choice = _PolicyCounts(self, (everything, remaining - everything, attention, nothing))
                candidate = (choice.flops, choice.num_recomputed, nothing, attention), choice
                if best is None or candidate[0] < best[0]:
                    best = candidate
        assert best is not None
        return best[1]
