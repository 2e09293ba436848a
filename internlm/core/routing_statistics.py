"""What the routers of a model count in a step, summed over all ranks, and the losses that balance them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.model_parallel import parallel_of
from internlm.model.moe.router import RouterLosses, routers_of


class RoutingStatistics:
    """The routers of a model in training.

    Args:
        chunks: of this rank.
        context: this rank's position and process groups.
        losses: coefficients of the routers' losses.
    """

    def __init__(self, chunks: Sequence[nn.Module], context: ParallelContext, losses: RouterLosses) -> None:
        self._losses = losses
        self._context = context
        self._routers = routers_of(chunks)
        architecture = getattr(chunks[0], "architecture", None)
        # A stage without a router takes part in the sums too.
        self._experts = None if architecture is None else architecture.experts
        self._num_layers = 0 if architecture is None else architecture.num_layers
        self._axes = ["data", "pipeline"]
        if parallel_of(chunks[0]).residual_axis is not None or context.layout.splits_tokens_of_routers:
            self._axes.append("tensor")
        self._num_samples = 1

    def begin_step(self, num_micro_batches: int, loss_scale: Tensor) -> None:
        """Start to count.

        Args:
            num_micro_batches: of each data rank in this step.
            loss_scale: scalar fp32, factor on the loss in backward.
        """
        self._num_samples = num_micro_batches * self._context.size("data")
        for router in self._routers:
            router.begin_step(self._losses, loss_scale / self._num_samples)

    def result(self) -> dict[str, Tensor]:
        """Scalar metrics of the step, the same on all ranks; empty for a model without routers. Collective.

        `moe/balance_loss` and `moe/z_loss` are sums over layers of means over samples, without their coefficients;
        `moe/load/N` is the largest number of tokens of an expert of layer N over the mean, `moe/max_load` its maximum
        over layers.
        """
        if self._experts is None:
            return {}
        num_experts = self._experts.form.num_experts
        sums = torch.zeros(self._num_layers, num_experts + 2, dtype=torch.float64, device=self._context.device)
        for router in self._routers:
            sums[router.layer] += router.sums()
        for axis in self._axes:
            all_reduce(sums, self._context.group(axis))
        counts, losses = sums[:, :num_experts], sums[:, num_experts:].sum(0).float() / self._num_samples
        loads = (counts.amax(-1) / counts.mean(-1).clamp(min=1e-9)).float()
        return {
            "moe/balance_loss": losses[0],
            "moe/z_loss": losses[1],
            "moe/max_load": loads.amax(),
            **{f"moe/load/{layer}": loads[layer] for layer in self._experts.layers(self._num_layers)},
        }
