"""The global gradient norm, and the divisor by which gradients are unscaled and clipped in the update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from internlm.core.communication.collectives import all_reduce
from internlm.core.context.parallel_context import ParallelContext
from internlm.solver.optimizer.bucket import Bucket

CLIP_EPSILON = 1e-6
"""torch.nn.utils.clip_grad_norm_ divides by norm + 1e-6; the same constant gives the same updates."""


def global_grad_norm(buckets: Sequence[Bucket], context: ParallelContext) -> Tensor:
    """L2 norm of the reduced gradients of the whole model, loss scale included; scalar fp32. Collective.

    Every element counts once, on however many ranks it is replicated.
    """
    squares = [bucket.squared_grad_norm() / bucket.kind.replication_factor(context) for bucket in buckets]
    # A pipeline stage whose weights are all frozen has no bucket.
    own = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=context.device)
    return all_reduce(own, context.world_group).sqrt().float()


def clip_divisor(grad_norm: Tensor, loss_scale: Tensor, max_norm: float) -> Tensor:
    """The divisor of gradients, scalar fp32: loss scale times clipping factor.

    Args:
        grad_norm: scalar fp32, loss scale removed.
        loss_scale: scalar fp32.
        max_norm: largest norm after clipping; 0 disables clipping.
    """
    if max_norm <= 0:
        return loss_scale
    return loss_scale * ((grad_norm + CLIP_EPSILON) / max_norm).clamp(min=1.0)
