"""`internlm doctor` tells what is there and what is wrong, on a healthy machine and on broken ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.commands import write_config
from torch import Tensor

from internlm.cli import main
from internlm.model.ops import implementations as registry
from internlm.model.ops import self_test
from internlm.model.ops.attention.cuda_backends import BACKENDS, choose_attention
from internlm.model.ops.implementations import OpSettings, describe
from internlm.utils.optional_packages import why_unusable


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    caches = (why_unusable, choose_attention)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def doctor(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["doctor", *map(str, arguments)])
    return code, capsys.readouterr().out


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code, text = doctor(capsys, "--json", *arguments)
    return code, json.loads(text)


@pytest.fixture
def small_heads(tmp_path: Path) -> Path:
    """A config with heads of 8 in fp32."""
    return write_config(tmp_path)


def test_a_healthy_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = report(capsys)
    assert code == 0 and found["ok"] and found["problems"] == []
    assert found["device"] == "cpu" and found["gpus"] == []
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_gib"] > 0
    assert found["software"]["torch"] == torch.__version__
    assert found["communication"]["gloo"]
    everything = describe("cpu", OpSettings(use_float8=True))
    assert found["ops"] == {name: choice._asdict() for name, choice in everything.items()}
    assert found["ops"]["float8_linear"]["implementation"] == "emulation"
    assert [one["name"] for one in found["attention_backends"]] == [backend.name for backend in BACKENDS]
    assert not any(one["usable"] for one in found["attention_backends"])
    assert {one["dtype"] for one in found["self_test"]} == {"bfloat16", "float32"}
    assert {one["op"] for one in found["self_test"]} == set(found["ops"])


def test_the_text_says_the_same(capsys: pytest.CaptureFixture[str], small_heads: Path) -> None:
    code, text = doctor(capsys, "--config", small_heads)
    assert code == 0 and "float8_linear" not in text
    assert f"ops on cpu (float32, head size 8, from {small_heads})" in text
    for name, choice in describe("cpu", OpSettings(torch.float32, head_dim=8)).items():
        assert name in text and choice.implementation in text
    assert text.splitlines()[-1] == "all ops pass"


def test_how_the_cpu_multiplies_is_a_key_of_the_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = write_config(tmp_path)
    arguments = ("--config", config, "--set", "model.dtype='torch.float16'", "--set", "model.cpu_gemm='fp32'")
    code, found = report(capsys, *arguments)
    assert code == 0 and found["ok"]
    assert found["ops"]["linear"] == {
        "implementation": "PyTorch's GEMMs in fp32, block by block, rounded once",
        "reason": "model.cpu_gemm = 'fp32'",
    }
    assert found["ops"]["attention"]["implementation"] == "SDPA in fp32, one call per document length"
    assert report(capsys, "--config", config)[1]["ops"]["linear"]["implementation"] == "PyTorch's GEMMs"


def test_a_wrong_op_is_named(
    capsys: pytest.CaptureFixture[str], small_heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = self_test.rms_norm

    def wrong(x: Tensor, weight: Tensor, eps: float, **options: Any) -> Tensor:
        return right(x, weight, 100 * eps, **options)

    monkeypatch.setattr(self_test, "rms_norm", wrong)
    code, text = doctor(capsys, "--config", small_heads)
    assert code == 1
    assert "PROBLEM: rms_norm, weight, float32: the result has a relative error of" in text
    assert "rms_norm              2 case(s)  2 WRONG" in text
    assert "layer_norm            1 case(s)  ok" in text
    assert text.splitlines()[-1] == "2 problem(s)"


def test_an_op_that_raises_is_named(
    capsys: pytest.CaptureFixture[str], small_heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(self_test, "layer_norm", broken)
    code, found = report(capsys, "--config", small_heads)
    assert code == 1
    assert found["problems"] == [
        "layer_norm, weight and bias, float32: RuntimeError: CUDA error: no kernel image is available"
    ]


def test_a_broken_package_is_named_and_breaks_nothing(
    capsys: pytest.CaptureFixture[str], small_heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (
        ("flash_attn", "raise ImportError('undefined symbol: _ZN3c105Error')"),
        ("flash_attn_interface", "raise OSError('libcuda.so.1 is missing')"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    code, found = report(capsys, "--config", small_heads)
    packages = {one["name"]: one for one in found["packages"]}
    assert code == 0
    assert packages["flash-attn"]["problem"] == (
        "flash_attn is installed but broken: ImportError: undefined symbol: _ZN3c105Error"
    )
    assert "OSError: libcuda.so.1 is missing" in packages["flash-attn-3"]["problem"]
    assert not packages["flash-attn"]["usable"] and packages["tokenizers"]["usable"]


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as can be asked without running on it, an A100."""
    card = SimpleNamespace(name="NVIDIA A100", major=8, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(registry, "capability_of", lambda device: (8, 0))


def test_a_config_that_asks_for_what_a_gpu_lacks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, a_gpu: None
) -> None:
    """Nothing is run: the choice itself is the problem."""
    config = write_config(tmp_path, 'model["dtype"] = "torch.bfloat16"\nmodel["attention_backend"] = "flash-attn-3"\n')
    code, found = report(capsys, "--config", config)
    assert code == 1 and found["self_test"] == []
    (problem,) = found["problems"]
    assert "'flash-attn-3' cannot be used: needs compute capability 9.x, this GPU has 8.0" in problem
    assert "torch-varlen" in problem
    assert found["gpus"] == [
        {"index": 0, "name": "NVIDIA A100", "capability": "8.0", "memory_gib": 80.0, "bf16": True, "float8": False}
    ]
    backends = {one["name"]: one for one in found["attention_backends"]}
    assert backends["torch-varlen"]["usable"] and backends["sdpa"]["usable"]
    assert backends["flash-attn-2"]["problem"].startswith("flash_attn is not installed")
    assert doctor(capsys, "--config", config)[0] == 1


def test_the_world_of_the_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = write_config(tmp_path, 'parallel = dict(tensor=dict(size=2, mode="mtp"))\n')
    assert main(["doctor", "--config", str(config)]) == 2
    capsys.readouterr()
    assert doctor(capsys, "--config", config, "--world-size", 2)[0] == 0


def test_keys_without_a_config_are_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--set", "model.dtype=torch.float32"]) == 2
    assert "--config" in capsys.readouterr().err
