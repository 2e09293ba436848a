"""msp: tensor parallelism with sequence-parallel activations.

The residual stream is split over the sequence, so norms and residual additions work on 1 / n of the tokens. The
all-reduces of mtp become an all-gather before column layers and a reduce-scatter after row layers, which send as many
bytes. The gathered input is saved for backward. Source: Korthikanti et al. 2022, arXiv:2205.05198.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from torch import Tensor

from internlm.core.communication.exchange import (
    SEQUENCE,
    exchange,
    gather,
    own_part,
    reduce_scatter,
    start_gather,
    start_reduce_scatter,
)
from internlm.core.communication.pending import Pending
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.context.gathered_attention import LatentGathering
from internlm.core.parallel.linear.parallel_linear import InputExchange, ParallelLinear
from internlm.core.parallel.modes.mtp import COLUMN_ROLES, Mtp
from internlm.model.modules.latent_attention import LatentAttention
from internlm.model.roles import Role


class GatheredInput(InputExchange):
    """The input is split over the sequence: gathered for the GEMM; its gradient is reduce-scattered."""

    def __init__(self, context: ParallelContext, *, saves_gathered: bool) -> None:
        self._context = context
        self.saves_gathered = saves_gathered

    def gather(self, x: Tensor) -> Tensor:
        return self.start_gather(x).wait()

    def start_gather(self, x: Tensor) -> Pending:
        return start_gather(x, self._context.group("tensor"))

    def start_reduce(self, grad: Tensor) -> Pending:
        return start_reduce_scatter(grad, self._context.group("tensor"))


class Msp(Mtp):
    """The mode msp; see the module docstring."""

    residual_is_split: ClassVar[bool] = True
    saves_gathered_input: ClassVar[bool] = True

    def own_tokens(self, values: Tensor) -> Tensor:
        return own_part(values, self.group)

    def sequence_length(self, num_tokens: int) -> int:
        return num_tokens // self.context.size("tensor")

    def input_exchange(self, role: Role) -> InputExchange:
        if role not in COLUMN_ROLES:
            return InputExchange()
        return GatheredInput(self.context, saves_gathered=self.saves_gathered_input)

    def share_key(self) -> Callable[[Tensor], Tensor] | None:
        return partial(gather, group=self.group)

    def gather_latents(self, attention: LatentAttention) -> LatentGathering | None:
        if not self.context.layout.gathers_latents:
            return None
        # Gathered over tensor ranks first, so the projection has nothing left to gather.
        assert isinstance(attention.wkv_b, ParallelLinear)
        attention.wkv_b.group.exchange = InputExchange()
        return LatentGathering(self.context, attention.inner.window, self.group)

    def reduce_output(self, out: Tensor) -> Tensor:
        return reduce_scatter(out, self.group)

    def gather_hidden(self, embedded: Tensor) -> Tensor:
        return exchange(embedded, self.group, split=SEQUENCE, join=2)

    def gather_residual(self, hidden: Tensor) -> Tensor:
        return gather(hidden, self.group)
