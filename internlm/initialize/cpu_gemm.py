"""One way of multiplying on CPUs for all ranks of a run."""

from __future__ import annotations

import torch

from internlm.core.communication.objects import of_all_ranks
from internlm.core.context.parallel_context import ParallelContext
from internlm.model.ops.cpu.gemm import choice, choose_cpu_gemm
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def agree_on_cpu_gemm(dtype: torch.dtype, context: ParallelContext) -> None:
    """Let all ranks multiply matrices of this dtype alike where their CPUs are of different kinds; collective.

    The key `model.cpu_gemm` decides. Where it leaves that to the CPUs and they differ, all ranks take fp32, which
    every CPU multiplies well enough, and the log says so.
    """
    if context.device.type != "cpu":
        return
    found = of_all_ranks(context, choice(dtype).implementation)
    if len(set(found)) > 1:
        logger.warning(
            "the ranks' CPUs are of different kinds: rank %d multiplies faster in fp32, rank %d in %s; all multiply in "
            "fp32, unless model.cpu_gemm is 'dtype'",
            found.index("fp32"),
            found.index("dtype"),
            str(dtype).removeprefix("torch."),
        )
        choose_cpu_gemm("fp32")
