"""Why Triton's kernels are not used: a reason for every failure."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from internlm.utils import triton_support
from internlm.utils.triton_support import why_no_triton


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    why_no_triton.cache_clear()
    yield
    why_no_triton.cache_clear()


def test_a_cpu_has_no_kernels() -> None:
    assert why_no_triton(torch.device("cpu")) == "Triton's kernels need a GPU, this is cpu"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler.\nSet CC."), "RuntimeError: Failed to find C compiler."),
        (AssertionError(), "AssertionError: "),
    ],
    ids=["message", "no message"],
)
def test_a_failing_trial_is_a_reason(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_trial(device: torch.device) -> None:
        raise error

    monkeypatch.setattr(triton_support, "why_unusable", lambda module: None)
    monkeypatch.setitem(sys.modules, "internlm.utils.triton_trial", SimpleNamespace(run_trial=run_trial))
    assert why_no_triton(torch.device("cuda")) == f"a trial kernel of Triton failed: {reason}"
