"""Bytes that layers save for backward, measured in a forward pass on this rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from helpers.memory import PeakMemory
from helpers.tiny import micro_batch
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize


def saved_by_model(
    model: Any,
    layout: ParallelLayout,
    num_tokens: int,
    prepare: Callable[[Any], None] = lambda model: None,
    *,
    options: ParallelOptions | None = None,
) -> int:
    """Bytes of all tensors that are alive after a forward pass, but for those from before it.

    Args:
        model: on the meta device.
        layout: of all ranks.
        num_tokens: of the micro-batch, one document, on all context ranks together.
        prepare: called with the parallelized model before the pass.
        options: of `parallelize`.

    Layers that predict later tokens are run, too.
    """
    context = ParallelContext.create(layout)
    model = parallelize(model, context, options=options)
    prepare(model)
    sample = parallel_of(model).split_sample(micro_batch(0, (num_tokens,)))
    micro, varlen = sample.micro_batch, sample.documents(sample.micro_batch)
    num_later = model.architecture.num_multi_token
    later = {"later_ids": micro.input_ids.repeat(num_later, 1)} if num_later else {}
    with PeakMemory() as memory:
        hidden = model(micro.input_ids, micro.position_ids, varlen, **later)
        if layout.world_size > 1:
            # The threads of a process group let go of a collective's tensors a moment after it is done.
            time.sleep(0.005)
        live = memory.live
    assert hidden.requires_grad
    context.close()
    return live
