"""CUDA graphs of compiled layers: the kernels of a layer's pass are launched as one.

They are recorded and replayed by PyTorch's CUDA graph trees (see them in its documentation), which
know where the memory of a recording is, but not when a pass of the model is over, nor which shapes it can do without.
This module tells them, in front of each pass. No line of it has run on a GPU yet.

A replay reads inputs and writes outputs at the addresses of the recording. So all that a layer gave in the pass before,
activations and gradients alike, is gone when the next pass begins:

- backward passes are over by then, as without a pipeline each micro batch goes forward and back alone;
- a gradient stays no longer in `.grad` than until its hook has run, which adds it to a bucket
  (`parameter_events.subscribe`). Left there it would be lost (https://github.com/pytorch/pytorch/issues/96693);
- weights are updated in place, in the buckets' buffers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from internlm.core.parallel.model_parallel import parallel_of
from internlm.model.ops.attention.causal_attention import VarlenMetadata

MODE = "reduce-overhead"
"""Of torch.compile: "default" and CUDA graphs."""


def prepare_passes(model: nn.Module) -> None:
    """Let every pass of `model` begin where recordings may be overwritten, and have one of few shapes. Changes it.

    From then on a pass that needs gradients must be followed by its backward pass before the next one begins.

    Args:
        model: after `parallelize`.

    Raises:
        ValueError: it is a stage of a pipeline, or its layers exchange tensors or postpone weight gradients.
    """
    parallel = parallel_of(model)
    if parallel.context.size("pipeline") > 1 or parallel.replaces_linears:
        raise ValueError("CUDA graphs are for whole models whose linear layers neither exchange nor postpone anything")
    model.register_forward_pre_hook(_begin_pass)


def _begin_pass(model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    torch.compiler.cudagraph_mark_step_begin()
    # A graph is for one number of documents and one upper bound of their lengths.
    return tuple(arg.rounded() if isinstance(arg, VarlenMetadata) else arg for arg in args)
