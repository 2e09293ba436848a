"""The feed-forward block of an expert layer: router, routed experts, shared experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from internlm.model.initialization import Normal, Zeros, set_initializer
from internlm.model.modules.feed_forward import FeedForward
from internlm.model.modules.linear import Linear
from internlm.model.moe.expert_order import ExpertOrder, combine, dispatch
from internlm.model.moe.experts import Experts
from internlm.model.moe.router import Router, Routing, with_added_loss
from internlm.model.moe.settings import ExpertSettings

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture


class MoeFeedForward(nn.Module):
    """The weighted sum of the outputs of each token's experts, and of the shared experts if there are any.

    Attributes:
        take_tokens: residual stream `[B, S, h]` -> the tokens that this rank routes, and those that its experts get.
        share_routing: routing of the former, number of rows B -> routing of the latter.
        return_tokens: results for the latter -> residual stream.
    """

    def __init__(self, architecture: Architecture, settings: ExpertSettings, layer: int) -> None:
        super().__init__()
        self.take_tokens: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda x: (x, x)
        self.share_routing: Callable[[Routing, int], Routing] = lambda routing, num_rows: routing
        self.return_tokens: Callable[[Tensor], Tensor] = lambda x: x
        self.router = Router(architecture, settings.form, layer, settings.selection, has_bias=settings.has_biases)
        self.shared_mix = settings.shared_mix
        self.shared: FeedForward | None = None
        self.shared_gate: nn.Linear | None = None
        if settings.shared_width:
            self.shared = FeedForward(dataclasses.replace(architecture, intermediate_size=settings.shared_width))
        # Behind the shared experts: weights are gathered ahead in the order of modules, which is that of their use.
        self.experts: nn.Module = Experts(architecture, settings.form.num_experts, settings.width, settings.has_biases)
        if settings.shared_width and settings.shared_mix != "sum":
            is_softmax = settings.shared_mix == "softmax"
            self.shared_gate = Linear(
                architecture.hidden_size, 2 if is_softmax else 1, bias=is_softmax, dtype=architecture.dtype
            )
            set_initializer(self.shared_gate.weight, Normal(architecture.init.ffn_other))
            if is_softmax:
                set_initializer(self.shared_gate.bias, Zeros())

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, h]` -> `[B, S, h]`."""
        own, tokens = self.take_tokens(x)
        routing = self.share_routing(self.router(own.flatten(0, 1), x.shape[0]), x.shape[0])
        order = ExpertOrder.of(routing.experts, self.router.form.num_experts, routing.kept)
        # Ranks may exchange these numbers while the device computes the shared experts.
        counts = self.experts.start(order.counts)  # type: ignore[operator]
        rows = dispatch(tokens.flatten(0, 1), order)
        shared = None if self.shared is None else self.shared(x)
        routed = combine(self.experts(rows, counts), routing.weights, order)
        out = self.return_tokens(with_added_loss(routed, routing.loss).view_as(tokens))
        return out if shared is None else self._mixed(x, out, shared)

    def _mixed(self, x: Tensor, routed: Tensor, shared: Tensor) -> Tensor:
        if self.shared_gate is None:
            return routed + shared
        gate = self.shared_gate(x)
        if self.shared_mix == "sigmoid":
            return routed + gate.sigmoid() * shared
        first, second = gate.softmax(-1).split(1, dim=-1)
        return routed * first + shared * second
