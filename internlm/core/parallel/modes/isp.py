"""isp: activations are split over the sequence, weights over the weight axis; full weights are gathered before use.

Linear layers, norms and the loss work on this rank's tokens. Attention, which needs all tokens of a sequence, is
replaced by `UlyssesAttention`. Weights are split over the `weight` axis of the weight view, whose size is independent
of the sequence degree. Source: InternEvo, Chen et al. 2024, arXiv:2401.09149.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.communication.exchange import gather, own_part, start_gather, start_reduce_scatter
from internlm.core.parallel.experts.expert_linear import ExpertLinear, ExpertWeightStore
from internlm.core.parallel.linear.parallel_linear import LinearGroup, ParallelLinear, WeightStore
from internlm.core.parallel.linear.weight_gathering import GatheredWeights
from internlm.core.parallel.model_parallel import HeadOutput, ModelParallel
from internlm.core.parallel.shard_spec import ShardSpec
from internlm.core.parallel.ulysses_attention import UlyssesAttention
from internlm.core.parallel.weight_splits import ParameterShard, padded_rows, ranges_spec
from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.moe.experts import Experts
from internlm.model.ops.cross_entropy import LossFunction
from internlm.model.roles import HeadShape, Role

_NOT_SPLIT = (
    *(Role.REPLICATED, Role.PER_HEAD, Role.PER_IMAGE, Role.PER_QUERY_CHANNEL, Role.PER_KV_CHANNEL),
    *(Role.ROUTER, Role.EXPERTS),
)


class Isp(ModelParallel):
    """The mode isp; see the module docstring."""

    token_axes: ClassVar[tuple[str, ...]] = ("data", "sample")
    scale_axis: ClassVar[str] = "sample"

    @cached_property
    def gathered_weights(self) -> GatheredWeights:
        """Gathers full weights from their shards."""
        options = self.options
        return GatheredWeights(
            self.context,
            self.weight_gradients,
            options.weight_gathering,
            options.expert_gathering,
            reduce_dtype=options.reduce_dtype,
            gather_float8=options.gather_float8,
            scales=self.weight_scales,
        )

    @property
    def _splits_weights(self) -> bool:
        return self.context.size("weight", "weight") > 1

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share the tokens of a sequence."""
        return self.context.group("tensor")

    @property
    def weight_group(self) -> dist.ProcessGroup | None:
        """The ranks that share one copy of the weights."""
        return self.context.group("weight", "weight")

    @property
    def splits_tokens_of_linears(self) -> bool:
        return self.context.size("tensor") > 1

    @property
    def replaces_linears(self) -> bool:
        return True

    @property
    def residual_axis(self) -> str:
        return "sample"

    def place(
        self, name: str, attribute: str, shape: tuple[int, ...], role: Role, heads: HeadShape | None
    ) -> list[ParameterShard]:
        whole = replace(ShardSpec.whole(name, shape), view="weight", data_axis="weight_data")
        if not self._splits_weights:
            return [ParameterShard(attribute, whole)]
        if role in _NOT_SPLIT:
            return [ParameterShard(attribute, replace(whole, partial_over=("weight",)))]
        n, t = self.context.size("weight", "weight"), self.context.index("weight", "weight")
        rows, block = padded_rows(shape[0], n, t)
        return [ParameterShard(attribute, ranges_spec(replace(whole, sharded_over=("weight",)), 0, [rows], block))]

    @property
    def _gathers(self) -> bool:
        return self._splits_weights or self.context.layout.expert_weight > 1

    def weights(self) -> WeightStore:
        return self.gathered_weights if self._gathers else super().weights()

    def make_group(self, name: str, layers: list[ParallelLinear]) -> LinearGroup:
        group = super().make_group(name, layers)
        if self._gathers:
            self.gathered_weights.register(group)
        return group

    def expert_weights(self) -> ExpertWeightStore:
        return self.gathered_weights if self.context.layout.expert_weight > 1 else super().expert_weights()

    def adapt_experts(self, name: str, experts: Experts) -> None:
        super().adapt_experts(name, experts)
        if self.context.layout.expert_weight > 1:
            for linear in (experts.linear13, experts.linear2):
                assert isinstance(linear, ExpertLinear)
                self.gathered_weights.register(linear)

    def inner_attention(self, inner: InnerAttention, heads: HeadShape) -> nn.Module:
        inside = super().inner_attention(inner, heads)
        is_split = self.context.size("tensor") > 1
        return UlyssesAttention(inside, self.context, heads) if is_split else inside

    def embed(self, weight: nn.Parameter, spec: ShardSpec, input_ids: Tensor) -> Tensor:
        own_ids = own_part(input_ids, self.group)
        return F.embedding(own_ids, self._gather_rows(weight, spec.global_shape[0]))

    def own_tokens(self, values: Tensor) -> Tensor:
        return own_part(values, self.group)

    def sequence_length(self, num_tokens: int) -> int:
        return num_tokens // self.context.size("tensor")

    def gather_features(self, features: Tensor) -> Tensor:
        return super().gather_features(gather(features, self.group, dim=0))

    def head_weight(self, model: nn.Module) -> Tensor:
        return self._gather_rows(super().head_weight(model), model.vocab_size)  # type: ignore[arg-type]

    def head_loss(
        self,
        model: nn.Module,
        hidden: Tensor,
        labels: Tensor,
        type_ids: Tensor,
        loss: LossFunction,
        weight: Tensor | None = None,
    ) -> HeadOutput:
        weight = self.head_weight(model) if weight is None else weight
        labels, type_ids = own_part(labels, self.group), own_part(type_ids, self.group)
        return HeadOutput(loss(hidden.flatten(0, 1), weight, labels.flatten()), labels, type_ids)

    def _gather_rows(self, shard: Tensor, num_rows: int) -> Tensor:
        if not self._splits_weights:
            return shard
        return _GatherRows.apply(shard, self.weight_group, self.options.reduce_dtype)[:num_rows]

    def end_backward(self) -> None:
        super().end_backward()
        self.gathered_weights.drop_unused()


class _GatherRows(torch.autograd.Function):
    """All-gather of the rows of a weight; its gradient is reduce-scattered in `reduce_dtype`."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: dist.ProcessGroup, reduce_dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.reduce_dtype = group, reduce_dtype
        return start_gather(shard, group, dim=0).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = start_reduce_scatter(grad.to(ctx.reduce_dtype), ctx.group, dim=0).wait()
        return own.to(grad.dtype), None, None
