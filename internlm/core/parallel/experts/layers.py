"""Adapts the expert layers of a model to the tokens and the experts of a rank."""

from __future__ import annotations

from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.communication.exchange import copy_to_ranks, gather, gather_replicated, own_part, start_gather
from internlm.core.parallel.experts.exchanged_experts import ExchangedExperts
from internlm.core.parallel.model_parallel import ModelParallel
from internlm.core.parallel.modes.mtp import Mtp
from internlm.model.moe.capacity import SamplePart
from internlm.model.moe.experts import Experts
from internlm.model.moe.feed_forward import MoeFeedForward
from internlm.model.moe.router import Routing
from internlm.model.recompute import as_routing_operator
from internlm.utils.copy_stream import copy_stream_of


def place_tokens_of_experts(model: nn.Module, parallel: ModelParallel) -> None:
    """Let routers count the tokens of a sample on all ranks that have a part of it, and bring rows to their experts."""
    context = parallel.context
    layers = [module for module in model.modules() if isinstance(module, MoeFeedForward)]
    stream = copy_stream_of(context.device)
    for module in layers:
        tensor, expert = context.group("tensor"), context.group("expert", "expert")
        sharing = context.group(parallel.routing_axis)
        if context.layout.expert_tensor > 1:
            assert tensor is not None and isinstance(parallel, Mtp)
            module.take_tokens = partial(_tokens_of_all_ranks, parallel=parallel)
            module.share_routing = partial(_routing_of_all_ranks, group=tensor)
            module.return_tokens = parallel.reduce_output
            assert isinstance(module.experts, Experts)
            module.experts.bias_share = 1 / context.layout.expert_tensor
        elif context.layout.splits_tokens_of_routers:
            assert tensor is not None
            module.take_tokens = partial(_own_tokens, group=tensor)
            module.return_tokens = partial(gather_replicated, group=tensor)
        if sharing is not None:
            module.router.num_sharing = dist.get_world_size(sharing)
            module.router.sum_over_sample = partial(_sum, group=sharing)
            module.router.part = SamplePart(
                dist.get_rank(sharing), dist.get_world_size(sharing), partial(_join, group=sharing)
            )
        if expert is not None:
            module.experts = ExchangedExperts(module.experts, expert, stream)


def routed_tokens(values: Tensor, parallel: ModelParallel) -> Tensor:
    """Values of all tokens of a sample, `[B, S]` -> those of the tokens that this rank routes, `[B, s]`."""
    if parallel.context.layout.splits_tokens_of_routers:
        return own_part(values, parallel.context.group("tensor"))
    return parallel.own_tokens(values)


def _own_tokens(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """A part of tokens that all ranks have; the gradients of all parts are joined."""
    own = own_part(copy_to_ranks(x, group), group)
    return own, own


# -- experts that are split over tensor ranks -------------------------------------------------------------------------
# Each rank computes a part of the width of an expert for the tokens of all ranks; the sum of the results is reduced as
# that of a row layer. A rank routes its part of the tokens, and uses the weights of all for its part of the results.


def _tokens_of_all_ranks(x: Tensor, parallel: Mtp) -> tuple[Tensor, Tensor]:
    full = parallel.gather_residual(x)
    return x if parallel.residual_is_split else own_part(full, parallel.group), full


def _routing_of_all_ranks(routing: Routing, num_rows: int, group: dist.ProcessGroup) -> Routing:
    # Dropped choices as negative numbers, so that one collective gathers both.
    kept = routing.kept
    experts = routing.experts if kept is None else routing.experts.where(kept, ~routing.experts)
    experts = experts.unflatten(0, (num_rows, -1))

    def gather_experts() -> list[Tensor]:
        return [start_gather(experts, group).wait().flatten(0, 1)]

    (shared,) = as_routing_operator(gather_experts, experts)
    weights = gather(routing.weights.unflatten(0, (num_rows, -1)), group).flatten(0, 1)
    if kept is None:
        return routing._replace(experts=shared, weights=weights)
    kept = shared >= 0
    return routing._replace(experts=shared.where(kept, ~shared), weights=weights, kept=kept)


def _join(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    return start_gather(part, group, dim=0).wait()


def _sum(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    return all_reduce(counts.clone(), group)
