"""The degrees of parallelism, and the three views of the ranks that follow from them.

Pure arithmetic: a layout of thousands of ranks needs no process group. The rank order is InternEvo's: tensor (or
weight, or expert tensor) innermost, then context or expert, then data, and pipeline outermost. ZeRO is the inner
sub-axis of the ranks that hold the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from internlm.core.context.rank_view import RankView
from internlm.utils.errors import ConfigError
from internlm.utils.layout_checks import check_head_first, check_integers, check_weight, check_world, check_zero

TensorMode = Literal["mtp", "msp", "fsp", "isp"]
"""Use of the tensor axis: Megatron tensor parallelism (mtp), with sequence-parallel activations (msp), which are also
saved as shards (fsp), or Ulysses sequence parallelism with sharded weights (isp)."""


@dataclass(frozen=True)
class ParallelLayout:
    """The degrees of parallelism of a run.

    Attributes:
        world_size: number of ranks.
        pipeline: pipeline degree.
        tensor: tensor degree; for isp the sequence (Ulysses) degree.
        context: context degree: ranks over which the tokens of a sample are dealt, beside the tensor ranks.
        weight: ISP weight degree, 1 in the other modes.
        zero: number of ranks over which the optimizer state is sharded; -1: all that hold the same weights.
        expert: expert degree.
        expert_inner: expert tensor degree; for isp expert weight degree.
        expert_zero: number of ranks over which the optimizer state of an expert is sharded; -1: all that hold it.
        mode: use of the tensor axis.
        head_first: whether tensor ranks are consecutive; isp may place context ranks next to each other instead.
        kv_replicas: consecutive tensor ranks that hold the same key-value head, if there are fewer heads than ranks.
    """

    world_size: int = 1
    pipeline: int = 1
    tensor: int = 1
    context: int = 1
    weight: int = 1
    zero: int = -1
    expert: int = 1
    expert_inner: int = 1
    expert_zero: int = -1
    mode: TensorMode = "mtp"
    head_first: bool = True
    kv_replicas: int = 1

    def __post_init__(self) -> None:
        sizes = {each.name: getattr(self, each.name) for each in fields(self) if each.type == "int"}
        check_integers(**sizes)
        if self.tensor % self.kv_replicas:
            raise ConfigError(
                f"{self.kv_replicas} copies of each key-value head do not divide {self.tensor} tensor ranks"
            )
        check_head_first(self.head_first, self.mode)
        check_weight(self.weight, self.mode)
        check_zero(self.zero, self.weight_data_size)
        check_zero(self.expert_zero, self.expert_data_size)

    @property
    def is_isp(self) -> bool:
        """Whether weights have a view of their own (isp)."""
        return self.mode == "isp"

    @cached_property
    def data_size(self) -> int:
        """Number of ranks with different samples."""
        return check_world(self.world_size, pipeline=self.pipeline, context=self.context, tensor=self.tensor)

    @cached_property
    def weight_data_size(self) -> int:
        """Number of ranks with the same weights."""
        if self.is_isp:
            return check_world(self.world_size, pipeline=self.pipeline, weight=self.weight)
        return self.data_size * self.context

    @cached_property
    def expert_data_size(self) -> int:
        """Number of ranks with the same experts."""
        return check_world(self.world_size, pipeline=self.pipeline, expert=self.expert, expert_inner=self.expert_inner)

    @property
    def expert_tensor(self) -> int:
        """Number of ranks that compute a part of the width of an expert each."""
        return 1 if self.is_isp else self.expert_inner

    @property
    def expert_weight(self) -> int:
        """Number of ranks that hold a part of the weights of an expert each, and gather them (isp)."""
        return self.expert_inner if self.is_isp else 1

    @property
    def splits_experts(self) -> bool:
        """Whether a rank holds a part of the experts of its layers."""
        return self.expert > 1 or self.expert_inner > 1

    @property
    def gathers_latents(self) -> bool:
        """Whether latent attention gathers latent vectors over context ranks, not the keys and values of all heads.

        The tensor ranks of isp exchange heads first, so that a rank has the keys and values of some heads only.
        """
        return self.context > 1 and not (self.is_isp and self.tensor > 1)

    @property
    def splits_tokens_of_routers(self) -> bool:
        """Whether tensor ranks with the same tokens (mtp) route a part of them each, as each has a part of experts."""
        return self.splits_experts and self.tensor > 1 and self.mode == "mtp"

    @property
    def exchanges_tokens_of_experts(self) -> bool:
        """Whether tensor ranks exchange tokens in front of and behind the experts of a layer."""
        return self.expert_tensor > 1 or self.splits_tokens_of_routers

    def _split_by_zero(self, axis: str, size: int, zero: int) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
        zero = size if zero <= 0 else zero
        return {f"{axis}_replica": size // zero, "zero": zero}, {axis: (f"{axis}_replica", "zero")}

    @property
    def _tensor(self) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
        if self.kv_replicas == 1:
            return {"tensor": self.tensor}, {}
        axes = {"kv": self.tensor // self.kv_replicas, "kv_replica": self.kv_replicas}
        return axes, {"tensor": tuple(axes)}

    @cached_property
    def activation(self) -> RankView:
        """pipeline x data x context x tensor, or (`head_first` False) pipeline x data x tensor x context.

        The merged axis `sample` is context and tensor together, the ranks that share a sample. With replicated
        key-value heads, tensor is `kv` x `kv_replica`.
        """
        tensor, merged = self._tensor
        context = {"context": self.context}
        sample = {**context, **tensor} if self.head_first else {**tensor, **context}
        axes = {"pipeline": self.pipeline, "data": self.data_size, **sample}
        return RankView("activation", axes, {"sample": tuple(sample), **merged})

    @cached_property
    def weight_view(self) -> RankView:
        """isp: pipeline x weight_data x weight; other modes: pipeline x data x tensor.

        `weight_data` and `data` are all ranks that hold the same weights, context ranks included; their inner sub-axis
        is `zero`.
        """
        name = "weight_data" if self.is_isp else "data"
        data, merged = self._split_by_zero(name, self.weight_data_size, self.zero)
        inner, parts = ({"weight": self.weight}, {}) if self.is_isp else self._tensor
        return RankView("weight", {"pipeline": self.pipeline, **data, **inner}, {**merged, **parts})

    @cached_property
    def expert_view(self) -> RankView:
        """pipeline x expert_data x expert x (expert_tensor | expert_weight)."""
        inner = "expert_weight" if self.is_isp else "expert_tensor"
        data, merged = self._split_by_zero("expert_data", self.expert_data_size, self.expert_zero)
        axes = {"pipeline": self.pipeline, **data, "expert": self.expert, inner: self.expert_inner}
        return RankView("expert", axes, merged)

    @property
    def views(self) -> tuple[RankView, RankView, RankView]:
        """The activation, weight and expert views."""
        return self.activation, self.weight_view, self.expert_view

    def describe(self) -> str:
        """A text of one line per view."""
        lines = []
        for view in self.views:
            axes = " x ".join(f"{axis} {size}" for axis, size in view.axes.items())
            lines.append(f"{view.name:<10} {axes}  (outermost first)")
        return "\n".join(lines)
