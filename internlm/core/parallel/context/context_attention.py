"""Attention over a sample whose tokens are dealt to context ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.context.attention_executor import attend
from internlm.core.parallel.context.block_traffic import ContextGroups
from internlm.core.parallel.context.split_batch import SplitDocuments
from internlm.model.modules.inner_attention import InnerAttention
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.rotary import RotaryTables


class ContextAttention(nn.Module):
    """Replaces an `InnerAttention` when each of c context ranks has T / c tokens of a sample.

    Args:
        inner: whose settings it takes over.
        context: this rank's position and process groups; collective over all ranks.
    """

    def __init__(self, inner: InnerAttention, context: ParallelContext) -> None:
        super().__init__()
        self.window = inner.window
        self.scale = inner.scale
        self._groups = context_groups(context)

    def local_rotary(self, tables: RotaryTables) -> RotaryTables:
        """Rotary tables of the tokens that `forward` gets: those of this rank, as positions travel with tokens."""
        return tables

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, varlen: VarlenMetadata | None, sinks: Tensor | None = None
    ) -> Tensor:
        """Compute attention; for the arguments see `InnerAttention.forward`, with S = T / c.

        Args:
            q, k, v: of this rank's tokens.
            varlen: a `SplitDocuments`.
            sinks: `[H]`, the logits of attention sinks; None: none.

        Raises:
            ValueError: the tokens were not dealt to the context ranks.
        """
        scale = 1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale
        plan = split_documents(varlen).plans[self.window]
        return attend(q, k, v, plan, self._groups, sinks=sinks, window=self.window, scale=scale)


def split_documents(varlen: VarlenMetadata | None) -> SplitDocuments:
    """The documents of a sample that is dealt to context ranks.

    Raises:
        ValueError: the tokens were not dealt to them.
    """
    if not isinstance(varlen, SplitDocuments):
        raise ValueError(
            "the layout has context ranks, and this forward pass has tokens that were not dealt to them: run it "
            "through Engine, or through ModelParallel.split_sample"
        )
    return varlen


def context_groups(context: ParallelContext) -> ContextGroups:
    """The process groups of this rank's context ranks; collective over all ranks."""
    keys = context.group("context")
    assert keys is not None
    view = context.view("activation")
    name = "context gradients", view.group("context", context.rank)
    is_new = not context.has_named_group(name)
    for ranks in view.groups("context"):
        context.make_named_group(("context gradients", ranks), ranks)
    groups = ContextGroups(keys, context.named_group(name))
    if is_new:
        # NCCL connects all ranks of a group at its first use, which must not be a step in which some send nothing.
        for group in groups:
            all_reduce(torch.zeros(1, device=context.device), group)
    return groups
