"""Adapts the expert layers of a model to the tokens and the experts of a rank."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.communication.exchange import copy_to_ranks, gather_replicated, own_part
from internlm.core.parallel.experts.exchanged_experts import ExchangedExperts
from internlm.core.parallel.model_parallel import ModelParallel
from internlm.model.moe.feed_forward import MoeFeedForward


def place_tokens_of_experts(model: nn.Module, parallel: ModelParallel) -> None:
    """Let routers count the tokens of a sample on all ranks that have a part of it, and exchange rows of experts."""
    context = parallel.context
    layers = [module for module in model.modules() if isinstance(module, MoeFeedForward)]
    for module in layers:
        tensor, expert = context.group("tensor"), context.group("expert", "expert")
        if context.layout.splits_tokens_of_routers:
            assert tensor is not None
            module.take_tokens = partial(_own_tokens, group=tensor)
            module.return_tokens = partial(gather_replicated, group=tensor)
        if tensor is not None and (parallel.residual_axis is not None or context.layout.splits_tokens_of_routers):
            module.router.num_sharing = dist.get_world_size(tensor)
            module.router.sum_over_sample = partial(_sum, group=tensor)
        if expert is not None:
            module.experts = ExchangedExperts(module.experts, expert)


def routed_tokens(values: Tensor, parallel: ModelParallel) -> Tensor:
    """Values of all tokens of a sample, `[B, S]` -> those of the tokens that this rank routes, `[B, s]`."""
    if parallel.context.layout.splits_tokens_of_routers:
        return own_part(values, parallel.context.group("tensor"))
    return parallel.own_tokens(values)


def _own_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A part of tokens that all ranks have; the gradients of all parts are joined."""
    return own_part(copy_to_ranks(x, group), group)


def _sum(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    return all_reduce(counts.clone(), group)
