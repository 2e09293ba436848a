"""Agreement of all ranks on one number format for CPU GEMMs."""

from __future__ import annotations

import torch

from internlm.core.communication.objects import of_all_ranks
from internlm.core.context.parallel_context import ParallelContext
from internlm.model.ops.cpu.gemm import choice, choose_cpu_gemm
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def agree_on_cpu_gemm(dtype: torch.dtype, context: ParallelContext) -> None:
    """Make all ranks run the GEMMs of `dtype` in one number format, even if their CPUs differ; collective.

    `model.cpu_gemm` takes precedence. If it leaves the choice to the CPUs and they disagree, all ranks use fp32, which
    every CPU supports well, and a warning is logged.
    """
    if context.device.type != "cpu":
        return
    found = of_all_ranks(context, choice(dtype).implementation)
    if len(set(found)) > 1:
        logger.warning(
            "the ranks have different CPUs: GEMMs are faster in fp32 on rank %d, in %s on rank %d; all ranks use fp32 "
            "unless model.cpu_gemm is 'dtype'",
            found.index("fp32"),
            str(dtype).removeprefix("torch."),
            found.index("dtype"),
        )
        choose_cpu_gemm("fp32")
