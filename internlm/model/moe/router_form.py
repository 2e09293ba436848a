"""The form of a router, as data: all that distinguishes the routers of different model families."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Scores = Literal["softmax", "sigmoid"]
"""Softmax over all experts, or the sigmoid of each expert's logit."""

GroupScore = Literal["max", "top2_sum"]
"""What ranks groups of experts: their best score, or the sum of their two best."""


@dataclass(frozen=True)
class RouterForm:
    """How a router chooses and weights the experts of a token; `routing.py` computes it.

    | family | form |
    |---|---|
    | Mixtral, InternEvo's Dropless, Qwen3-MoE | softmax, normalizes |
    | Switch, Qwen2-MoE, OLMoE | softmax, not normalized |
    | DeepSeek-V2 | softmax, not normalized, scale, groups by max |
    | DeepSeek-V3, Kimi K2, GLM-4.5 | sigmoid, normalizes, scale, bias, groups by top2_sum |

    Attributes:
        num_experts: number of routed experts.
        top_k: number of experts of a token.
        scores: how logits become scores.
        normalizes: whether the weights of a token are divided by their sum.
        scale: factor on the weights.
        has_bias: whether a bias per expert is added to the scores for the choice, never to the weights.
        num_groups: number of groups of consecutive experts, all of one size.
        top_groups: number of groups that a token may choose experts from, 1 to `num_groups`.
        group_score: what ranks the groups.

    Raises:
        ValueError: if a field is out of range or contradicts another.
    """

    num_experts: int
    top_k: int
    scores: Scores = "softmax"
    normalizes: bool = True
    scale: float = 1.0
    has_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = "max"

    def __post_init__(self) -> None:
        _check_at_least_one("num_experts", self.num_experts)
        _check_at_least_one("top_k", self.top_k)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k = {self.top_k} must be at most num_experts = {self.num_experts}")
        _check_choice("scores", self.scores, get_args(Scores))
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale = {self.scale} must be a finite number above 0")
        self._check_groups()

    def _check_groups(self) -> None:
        _check_at_least_one("num_groups", self.num_groups)
        _check_at_least_one("top_groups", self.top_groups)
        _check_choice("group_score", self.group_score, get_args(GroupScore))
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups = {self.num_groups} must divide num_experts = {self.num_experts}")
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups = {self.top_groups} must be at most num_groups = {self.num_groups}")
        if not self.has_group_limit:
            return
        if self.group_score == "top2_sum" and self.experts_per_group < 2:
            raise ValueError(
                f"num_groups = {self.num_groups} must be at most {self.num_experts // 2}, half of num_experts: "
                "group_score = 'top2_sum' needs groups of at least 2 experts"
            )
        if self.top_groups * self.experts_per_group < self.top_k:
            least = -(-self.top_k // self.experts_per_group)
            raise ValueError(
                f"top_groups = {self.top_groups} must be at least {least}: groups of {self.experts_per_group} experts "
                f"have to provide top_k = {self.top_k}"
            )

    @property
    def experts_per_group(self) -> int:
        """Number of experts in each group."""
        return self.num_experts // self.num_groups

    @property
    def has_group_limit(self) -> bool:
        """Whether a token may choose from some of the groups only."""
        return self.top_groups < self.num_groups


def _check_at_least_one(field: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{field} = {value} must be at least 1")


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field} = {value!r} must be one of {', '.join(map(repr, choices))}")
