"""mtp: Megatron's tensor parallelism. The residual stream is replicated on the tensor ranks.

A column layer splits its output features, a row layer its input features; the output of a row layer is summed over the
ranks. A pair of them costs one all-reduce in forward (of the output) and one in backward (of the input's gradient).
Source: Shoeybi et al. 2019, arXiv:1909.08053.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from internlm.core.communication.exchange import (
    copy_to_ranks,
    gather,
    gather_replicated,
    start_all_reduce,
    sum_over_ranks,
)
from internlm.core.communication.pending import Pending
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.parallel_linear import InputExchange
from internlm.core.parallel.model_parallel import HeadOutput, ModelParallel
from internlm.core.parallel.shard_spec import ShardSpec
from internlm.core.parallel.vocab import VocabRanks
from internlm.core.parallel.weight_splits import ParameterShard, kv_replicas, padded_rows, ranges_spec, tensor_parts
from internlm.model.ops.cross_entropy import LossFunction
from internlm.model.roles import HeadShape, Role

COLUMN_ROLES = (
    *(Role.COLUMN, Role.COLUMN_PAIR, Role.COLUMN_TO_RESIDUAL),
    *(Role.ATTENTION_QKV, Role.ATTENTION_Q, Role.ATTENTION_KV),
)
ROW_ROLES = (Role.ROW, Role.ATTENTION_OUT)
LINEAR_ROLES = (*COLUMN_ROLES, *ROW_ROLES, Role.LATENT)


class CopiedInput(InputExchange):
    """The input is replicated; its gradient is all-reduced (sum)."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context

    def start_reduce(self, grad: Tensor) -> Pending:
        return start_all_reduce(grad, self._context.group("tensor"))


class Mtp(ModelParallel):
    """The mode mtp; see the module docstring. Msp and fsp split weights in the same way, but not the residual stream.

    Attributes:
        residual_is_split: whether the residual stream is split over the sequence.
    """

    residual_is_split: ClassVar[bool] = False
    scale_axis: ClassVar[str] = "sample"

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The tensor group."""
        return self.context.group("tensor")

    @property
    def replaces_linears(self) -> bool:
        return True

    @property
    def residual_axis(self) -> str:
        return "sample" if self.residual_is_split else "context"

    def place(
        self, name: str, attribute: str, shape: tuple[int, ...], role: Role, heads: HeadShape | None
    ) -> list[ParameterShard]:
        whole = ShardSpec.whole(name, shape)
        on_tokens = replace(whole, partial_over=("tensor",)) if self.residual_is_split else whole
        if role in (Role.REPLICATED, Role.LATENT, Role.EXPERTS):
            return [ParameterShard(attribute, on_tokens)]
        if role is Role.ROUTER:
            is_partial = self.residual_is_split or self.context.layout.splits_tokens_of_routers
            return [ParameterShard(attribute, replace(whole, partial_over=("tensor",)) if is_partial else whole)]
        if role in (Role.PER_HEAD, Role.PER_IMAGE):
            # Each rank computes the gradient of its own heads or pictures, whether or not the residual stream is split.
            return [ParameterShard(attribute, replace(whole, partial_over=("tensor",)))]
        if role in (Role.PER_QUERY_CHANNEL, Role.PER_KV_CHANNEL):
            of_projection = Role.ATTENTION_Q if role is Role.PER_QUERY_CHANNEL else Role.ATTENTION_KV
            return tensor_parts(self.context, whole, attribute, of_projection, heads)
        if role in (Role.EMBEDDING, Role.HEAD):
            return [ParameterShard(attribute, self._place_vocabulary(whole, role))]
        if role in ROW_ROLES and attribute == "bias":
            return [ParameterShard(attribute, on_tokens)]
        return tensor_parts(self.context, whole, attribute, role, heads)

    def _place_vocabulary(self, whole: ShardSpec, role: Role) -> ShardSpec:
        n, t = self.context.size("tensor"), self.context.index("tensor")
        split = replace(whole, sharded_over=("tensor",))
        hidden = whole.global_shape[-1]
        by_hidden = role is Role.EMBEDDING and self.options.split_embedding_hidden and not self.has_tied_head
        if by_hidden and hidden % n == 0:
            return ranges_spec(split, 1, [(t * (hidden // n), hidden // n)])
        rows, block = padded_rows(whole.global_shape[0], n, t)
        return ranges_spec(split, 0, [rows], block)

    def local_heads(self, heads: HeadShape) -> HeadShape:
        n = self.context.size("tensor")
        return HeadShape(heads.num_heads // n, heads.num_kv_heads * kv_replicas(heads, n) // n, heads.head_dim)

    def sum_over_heads(self, role: Role, heads: HeadShape) -> Callable[[Tensor], Tensor] | None:
        replicas = kv_replicas(heads, self.context.size("tensor")) if role is Role.PER_KV_CHANNEL else 1
        return lambda partial: copy_to_ranks(sum_over_ranks(partial / replicas, self.group), self.group)

    def input_exchange(self, role: Role) -> InputExchange:
        return CopiedInput(self.context) if role in COLUMN_ROLES else InputExchange()

    def finish_output(self, role: Role) -> Callable[[Tensor], Tensor] | None:
        if role is Role.COLUMN_TO_RESIDUAL:
            return self.gather_hidden
        return self.reduce_output if role in ROW_ROLES else None

    def share_key(self) -> Callable[[Tensor], Tensor] | None:
        return partial(copy_to_ranks, group=self.group)

    def embed(self, weight: nn.Parameter, spec: ShardSpec, input_ids: Tensor) -> Tensor:
        if spec.local_shape[0] == spec.global_shape[0]:
            return self.gather_hidden(F.embedding(input_ids, weight))
        local_ids = input_ids - self.context.index("tensor") * spec.local_shape[0]
        is_elsewhere = (local_ids < 0) | (local_ids >= spec.local_shape[0])
        found = F.embedding(local_ids.masked_fill(is_elsewhere, 0), weight)
        return self.reduce_output(found.masked_fill(is_elsewhere.unsqueeze(-1), 0))

    def gather_features(self, features: Tensor) -> Tensor:
        # Where all tensor ranks have all tokens, each of them has the whole gradient of every feature.
        collect = gather if self.residual_is_split else gather_replicated
        return super().gather_features(collect(features, self.group, dim=0))

    def head_loss(
        self,
        model: nn.Module,
        hidden: Tensor,
        labels: Tensor,
        type_ids: Tensor,
        loss: LossFunction,
        weight: Tensor | None = None,
    ) -> HeadOutput:
        hidden = self.gather_residual(hidden)
        weight = self.head_weight(model) if weight is None else weight
        vocab = VocabRanks(self.context, weight.shape[0], model.vocab_size)  # type: ignore[arg-type]
        return HeadOutput(loss(hidden.flatten(0, 1), weight, labels.flatten(), vocab=vocab), labels, type_ids)

    # -- the residual stream: overridden by msp and fsp -----------------------------------------------------------

    def reduce_output(self, out: Tensor) -> Tensor:
        """This rank's partial sum, `[B, S, h]` -> residual stream."""
        return sum_over_ranks(out, self.group)

    def gather_hidden(self, embedded: Tensor) -> Tensor:
        """This rank's channels, `[B, S, h / n]` -> residual stream."""
        return gather_replicated(embedded, self.group, dim=2)

    def gather_residual(self, hidden: Tensor) -> Tensor:
        """Residual stream -> input of the vocabulary-parallel head, `[B, S, h]`."""
        return copy_to_ranks(hidden, self.group)
