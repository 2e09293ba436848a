"""isp: tokens stay split over the sequence, weights are split over ranks of their own and gathered where they are used.

Linear layers, norms and the loss work on this rank's tokens; attention needs all tokens of a sequence, so an all-to-all
before it trades tokens for heads, and one behind it trades them back (DeepSpeed-Ulysses, Jacobs et al. 2023,
arXiv:2309.14509). Weights are split over the `weight` axis of the weight view, which is independent of the sequence
degree (InternEvo, Chen et al. 2024, arXiv:2401.09149).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.communication.exchange import SEQUENCE, exchange, own_part, start_gather, start_reduce_scatter
from internlm.core.parallel.linear.parallel_linear import LinearGroup, ParallelLinear, WeightStore
from internlm.core.parallel.linear.weight_gathering import GatheredWeights, GatherPlan
from internlm.core.parallel.model_parallel import HeadOutput, ModelParallel
from internlm.core.parallel.shard_spec import ShardSpec
from internlm.core.parallel.weight_splits import Part, kv_replicas, padded_rows, ranges_spec
from internlm.model.ops.cross_entropy import LossFunction
from internlm.model.roles import HeadShape, Role

_HEADS = 2
"""The dimension of heads, or of all channels, in `[B, S, ...]`."""


class Isp(ModelParallel):
    """See the module."""

    token_axes: ClassVar[tuple[str, ...]] = ("data", "tensor")
    scale_axis: ClassVar[str | None] = "tensor"

    @cached_property
    def gathered_weights(self) -> GatheredWeights:
        """Where whole weights come from when they are split."""
        options = self.options
        return GatheredWeights(
            self.context,
            self.weight_gradients,
            GatherPlan(options.weight_overlap, options.gather_ahead, options.gather_layer_before),
            memory_pool=options.memory_pool,
            release_gradients_early=options.release_gradients_early,
            reduce_dtype=options.reduce_dtype,
            gather_float8=options.gather_float8,
            scales=self.whole_scales,
        )

    @property
    def _splits_weights(self) -> bool:
        return self.context.size("weight", "weight") > 1

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The sequence group."""
        return self.context.group("tensor")

    @property
    def weight_group(self) -> dist.ProcessGroup | None:
        """The ranks that share one copy of the weights."""
        return self.context.group("weight", "weight")

    @property
    def replaces_linears(self) -> bool:
        return True

    def place(self, name: str, attribute: str, shape: tuple[int, ...], role: Role) -> list[Part]:
        whole = replace(ShardSpec.whole(name, shape), view="weight", data_axis="weight_data")
        if not self._splits_weights:
            return [Part(attribute, whole)]
        if role in (Role.REPLICATED, Role.PER_HEAD):
            return [Part(attribute, replace(whole, partial_over=("weight",)))]
        n, t = self.context.size("weight", "weight"), self.context.index("weight", "weight")
        rows, block = padded_rows(shape[0], n, t)
        return [Part(attribute, ranges_spec(replace(whole, sharded_over=("weight",)), 0, [rows], block))]

    def local_heads(self) -> HeadShape | None:
        if self.heads is None:
            return None
        n = self.context.size("tensor")
        held = self.heads.num_kv_heads * kv_replicas(self.heads, n) // n
        return HeadShape(self.heads.num_heads // n, held, self.heads.head_dim)

    def weights(self) -> WeightStore:
        return self.gathered_weights if self._splits_weights else super().weights()

    def make_group(self, name: str, layers: list[ParallelLinear]) -> LinearGroup:
        group = super().make_group(name, layers)
        if self._splits_weights:
            self.gathered_weights.register(
                group, [p for layer in layers for part in layer.parts() for p in part if p is not None]
            )
        return group

    def prepare_input(self, role: Role, x: Tensor) -> Tensor:
        return exchange(x, self.group, split=SEQUENCE, join=_HEADS) if role is Role.ATTENTION_OUT else x

    def finish_output(self, role: Role, out: Tensor) -> Tensor:
        if role not in (Role.ATTENTION_QKV, Role.ATTENTION_Q, Role.ATTENTION_KV) or self.group is None:
            return out
        assert self.heads is not None
        replicas = kv_replicas(self.heads, self.context.size("tensor"))
        if replicas > 1 and role is Role.ATTENTION_KV:
            out = out.unflatten(-1, (-1, self.heads.head_dim)).repeat_interleave(replicas, dim=_HEADS).flatten(_HEADS)
        elif replicas > 1 and role is Role.ATTENTION_QKV:
            out = self._replicate_key_values(out, replicas)
        return exchange(out, self.group, split=_HEADS, join=SEQUENCE)

    def _replicate_key_values(self, qkv: Tensor, replicas: int) -> Tensor:
        """By group of queries, key and value -> the same with each group's queries dealt to `replicas` groups."""
        assert self.heads is not None
        groups = qkv.unflatten(-1, (self.heads.num_kv_heads, -1, self.heads.head_dim))
        queries = groups[..., :-2, :].unflatten(-2, (replicas, -1))
        key_values = groups[..., -2:, :].unsqueeze(-3).expand(*queries.shape[:-2], 2, -1)
        return torch.cat((queries, key_values), dim=-2).flatten(_HEADS)

    def embed(self, weight: nn.Parameter, spec: ShardSpec, input_ids: Tensor) -> Tensor:
        own_ids = own_part(input_ids, self.group)
        return F.embedding(own_ids, self._gather_rows(weight, spec.global_shape[0]))

    def sequence_length(self, num_tokens: int) -> int:
        return num_tokens // self.context.size("tensor")

    def head_loss(
        self, model: nn.Module, hidden: Tensor, labels: Tensor, type_ids: Tensor, loss: LossFunction
    ) -> HeadOutput:
        weight = self._gather_rows(model.head_weight(), model.vocab_size)  # type: ignore[operator,arg-type]
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
    """All ranks' rows of a weight; its gradient is summed in `reduce_dtype` and scattered."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: dist.ProcessGroup, reduce_dtype: torch.dtype) -> Tensor:
        ctx.group, ctx.reduce_dtype = group, reduce_dtype
        return start_gather(shard, group, dim=0).wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = start_reduce_scatter(grad.to(ctx.reduce_dtype), ctx.group, dim=0).wait()
        return own.to(grad.dtype), None, None
