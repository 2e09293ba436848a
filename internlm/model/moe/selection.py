"""How a router selects tokens for experts beyond its form: capacity and noise, from InternEvo's kinds of layers.

| `moe_type` | capacity | weights | balance |
|---|---|---|---|
| Dropless | with `capacity_factor`; largest weights or first tokens | not renormalized after dropping | all choices |
| GShard, `use_fused_gating` or k > 2 | first choices of tokens before the second | renormalized | first choices |
| GShard, k = 2 | the same; the second choice in training with Gumbel noise | renormalized | first choices |
| GShard, k = 1 | random tokens (`use_rts`), else the first | the probability itself | first choices |
| MegaBlock | first tokens, rounded down | not renormalized after dropping | all choices |
| MegaBlock-Dropless | - | | all choices |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from internlm.config.capacity import expert_capacity
from internlm.model.moe.capacity import Capacity, Priority
from internlm.model.moe.noise import GumbelChoices, RouterNoise

if TYPE_CHECKING:
    from internlm.config.schema import ModelConfig

JITTER = 1e-2
"""Of `noisy_gate_policy = "Jitter"`, as in InternEvo."""


@dataclass(frozen=True)
class Selection:
    """Capacity and noise of every router of a model.

    Attributes:
        capacity: None: no token is dropped.
        noise: in training; two selections that differ in it compute the same function.
        balances_first: the balance loss counts the first choice of a token only.
        normalizes: whether the form of the router may normalize weights.
    """

    capacity: Capacity | None = None
    noise: RouterNoise = field(default_factory=RouterNoise, compare=False)
    balances_first: bool = False
    normalizes: bool = True

    @property
    def needs_positions(self) -> bool:
        """Whether the choice for a token depends on its position in the sample."""
        return self.capacity is not None or self.noise != RouterNoise()


def selection_of(config: ModelConfig) -> Selection:
    """The selection that the `model` section of a mixture asks for."""
    keys, kind = config.moe_layer_kwargs, config.moe_type
    jitter = JITTER if keys.noisy_gate_policy == "Jitter" else 0.0
    gumbel: GumbelChoices = "all" if keys.noisy_gate_policy == "RSample" else "none"
    priority: Priority = "weight" if kind == "Dropless" and keys.drop_policy == "probs" else "position"
    normalizes = True
    if kind == "GShard":
        is_fused = keys.use_fused_gating or config.top_k > 2
        if config.top_k == 2 and not is_fused:
            gumbel = "after_first"
        normalizes = is_fused or config.top_k > 1
        priority = "random" if keys.use_rts and not normalizes else "choice"
    limits, capacity = expert_capacity(config), None
    if limits is not None:
        renormalizes = kind == "GShard" and normalizes and keys.normalize_expert_weights
        capacity = Capacity(*limits, priority, renormalizes, rounds_up=kind != "MegaBlock")
    return Selection(capacity, RouterNoise(jitter, gumbel), kind == "GShard", normalizes)
