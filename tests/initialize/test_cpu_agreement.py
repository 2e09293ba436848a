"""Ranks with different CPUs run their GEMMs in one number format, and log it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from helpers.ranks import RankPool

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.initialize import cpu_gemm as agreement
from internlm.model.ops.cpu import gemm as cpu_gemm
from internlm.model.ops.cpu.gemm import CpuFeatures, CpuGemm, choice, choose_cpu_gemm

KINDS = (
    CpuFeatures("x86_64", "GenuineIntel", frozenset({"avx512_bf16", "amx_bf16"})),
    CpuFeatures("x86_64", "GenuineIntel", frozenset({"avx512_bf16"})),
)


def agree(setting: CpuGemm, kinds: tuple[CpuFeatures, ...]) -> tuple[str, list[str]]:
    """What this rank then does, and its warnings."""
    context = ParallelContext.create(ParallelLayout(world_size=2))
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    agreement.logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_gemm, "this_cpu", lambda: kinds[context.rank])
        try:
            choose_cpu_gemm(setting)
            agreement.agree_on_cpu_gemm(torch.bfloat16, context)
            return choice(torch.bfloat16).implementation, warnings
        finally:
            agreement.logger.removeHandler(handler)
            choose_cpu_gemm("auto")
            context.close()


def test_unlike_cpus_take_fp32(ranks: Callable[[int], RankPool]) -> None:
    for chosen, warnings in ranks(2).run(agree, "auto", KINDS):
        assert chosen == "fp32"
        assert warnings == [
            "the ranks have different CPUs: GEMMs are faster in fp32 on rank 1, in bfloat16 on rank 0; all ranks use "
            "fp32 unless model.cpu_gemm is 'dtype'"
        ]


@pytest.mark.parametrize(
    ("setting", "kind", "expected"), [("dtype", 1, "dtype"), ("auto", 0, "dtype"), ("auto", 1, "fp32")]
)
def test_equal_cpus_and_a_key_need_no_agreement(
    ranks: Callable[[int], RankPool], setting: str, kind: int, expected: str
) -> None:
    kinds = KINDS if setting == "dtype" else (KINDS[kind], KINDS[kind])
    assert ranks(2).run(agree, setting, kinds) == [(expected, []), (expected, [])]
