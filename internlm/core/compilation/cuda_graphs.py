"""CUDA graphs of compiled layers: the kernels of a layer's pass are launched as one.

PyTorch's CUDA graph trees record and replay them (see its documentation). They manage the memory of recordings, but do
not know when a pass of the model is over, nor which shapes are needed. This module tells them before each pass. It has
not run on a GPU yet.

A replay reads inputs and writes outputs at the addresses of the recording. So the outputs of a layer in one pass,
activations and gradients alike, are overwritten by the next pass:

- backward passes are over by then: without a pipeline, each micro-batch runs forward and backward alone;
- a gradient stays in `.grad` only until its hook has added it to a bucket (`parameter_events.subscribe`); left there,
  it would be lost (https://github.com/pytorch/pytorch/issues/96693);
- weights are updated in place, in the buckets' buffers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from internlm.core.parallel.model_parallel import parallel_of
from internlm.model.moe.router import routers_of
from internlm.model.ops.attention.causal_attention import VarlenMetadata

MODE = "reduce-overhead"
"""Mode of torch.compile: "default" with CUDA graphs."""


def prepare_passes(model: nn.Module) -> None:
    """Mark the start of every pass of `model`, and round its shapes so that few graphs are needed. Changes `model`.

    From then on, a pass with gradients must be followed by its backward pass before the next pass begins.

    Args:
        model: after `parallelize`.

    Raises:
        ValueError: it is a stage of a pipeline, it has experts, or its linear layers communicate or postpone weight
            gradients.
    """
    parallel = parallel_of(model)
    if parallel.context.size("pipeline") > 1 or parallel.replaces_linears or routers_of([model]):
        raise ValueError(
            "CUDA graphs are for whole models without experts, whose linear layers neither communicate nor postpone "
            "weight gradients"
        )
    model.register_forward_pre_hook(_begin_pass)


def _begin_pass(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    torch.compiler.cudagraph_mark_step_begin()
    # A graph is recorded for one number of documents and one bound on their lengths.
    return tuple(arg.rounded() if isinstance(arg, VarlenMetadata) else arg for arg in args)
