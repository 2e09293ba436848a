"""When Liger's kernels are taken, and with which arguments. The kernels need a GPU: tests/cuda/test_cuda_ops.py."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.model.ops import liger_kernels as liger
from internlm.model.ops.gated_activation import gated_activation
from internlm.model.ops.implementations import OpSettings, describe
from internlm.model.ops.norm import rms_norm
from internlm.utils.errors import ConfigError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def install(there: bool) -> None:
        monkeypatch.setattr(liger, "why_unusable", lambda *_: None if there else "liger_kernel is not installed")

    return install


def test_auto_takes_it_where_nothing_is_compiled(installed: Callable[[bool], None]) -> None:
    installed(True)
    assert describe(CUDA)["rms_norm"].implementation == "liger_kernel.ops.LigerRMSNormFunction"
    assert "LigerSiLUMulFunction" in describe(CUDA)["gated_activation"].implementation
    for settings, reason in (
        (OpSettings(compiled=True), "compiled"),
        (OpSettings(fused_kernels="none"), "model.fused_kernels is 'none'"),
    ):
        for op in ("rms_norm", "gated_activation"):
            chosen = describe(CUDA, settings)[op]
            assert "iger" not in chosen.implementation and reason in chosen.reason
    assert "iger" not in "".join(describe(CPU)["rms_norm"])


def test_without_it_the_log_says_so(installed: Callable[[bool], None]) -> None:
    installed(False)
    chosen = describe(CUDA)["rms_norm"]
    assert chosen.implementation == "torch.nn.functional.rms_norm" and "liger_kernel is not installed" in chosen.reason


def test_asking_for_it_in_vain_is_a_mistake(installed: Callable[[bool], None]) -> None:
    installed(False)
    with pytest.raises(
        ConfigError, match=r"model\.fused_kernels = 'liger' cannot be used: liger_kernel is not installed"
    ):
        describe(CUDA, OpSettings(fused_kernels="liger"))
    # A config made for a GPU also runs on a CPU.
    describe(CPU, OpSettings(fused_kernels="liger"))


def _tensor(dtype: torch.dtype = torch.bfloat16, numbers: int = 3, is_cuda: bool = True) -> Any:
    return SimpleNamespace(dtype=dtype, is_cuda=is_cuda, device=CUDA if is_cuda else CPU, numel=lambda: numbers)


def test_tensors_it_serves(installed: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    installed(True)
    assert liger.serves(_tensor(), "auto") and liger.serves(_tensor(torch.float32), "liger")
    assert not liger.serves(_tensor(), "none")
    assert not liger.serves(_tensor(torch.float64), "auto")
    assert not liger.serves(_tensor(numbers=0), "auto")
    assert not liger.serves(_tensor(is_cuda=False), "liger")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not liger.serves(_tensor(), "auto")


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the names that the installed Liger gives them: all in fp32 and rounded once, nothing written over."""
    operators = importlib.import_module("liger_kernel.ops")
    calls: list[dict[str, Any]] = []

    def stand_in(name: str) -> Any:
        signature = inspect.signature(getattr(operators, name).forward)

        def apply(*arguments: Any) -> Tensor:
            calls.append(signature.bind(None, *arguments).arguments)
            return arguments[0]

        return SimpleNamespace(apply=apply)

    for name in ("LigerRMSNormFunction", "LigerSiLUMulFunction", "LigerGELUMulFunction"):
        monkeypatch.setattr(operators, name, stand_in(name))
    monkeypatch.setattr(liger, "serves", lambda x, fused_kernels: fused_kernels == "auto")
    x, weight, up = torch.ones(2, 4), torch.ones(4), torch.zeros(2, 4)
    for unit_offset in (False, True):
        rms_norm(x, weight, 1e-3, unit_offset=unit_offset)
        call = calls.pop()
        assert call["X"] is x and call["W"] is weight and call["eps"] == 1e-3
        assert call["offset"] == float(unit_offset) and call["casting_mode"] == "gemma" and call["in_place"] is False
    for activation in ("silu", "gelu_tanh"):
        gated_activation(x, up, activation)  # type: ignore[arg-type]
        call = calls.pop()
        assert call["a"] is x and call["b"] is up
    rms_norm(x, weight, 1e-3, fused_kernels="none")
    gated_activation(x, up, "silu", fused_kernels="none")
    assert not calls
