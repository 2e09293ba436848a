"""`internlm doctor`: reports hardware and software, chooses the implementation of each op, and runs their self-tests.

Its output belongs in a bug report. With `--config` it uses that model's dtype, head size and backends.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import internlm
from internlm.commands.config_options import add_config_options
from internlm.config.loader import load_config
from internlm.model.ops.attention.cuda_backends import BACKENDS, why_not
from internlm.model.ops.cpu.gemm import choose_cpu_gemm
from internlm.model.ops.implementations import OpSettings, describe
from internlm.model.ops.self_test import self_tests
from internlm.utils.errors import ConfigError
from internlm.utils.openmp import waiting_of_threads
from internlm.utils.optional_packages import version_of, why_unusable
from internlm.utils.text_table import text_table
from internlm.utils.triton_support import why_no_triton


@dataclass(frozen=True)
class OptionalPackage:
    """A package that is not required.

    Attributes:
        distribution: name on the package index.
        module: module that is imported.
        purpose: what it is used for.
    """

    distribution: str
    module: str
    purpose: str


PACKAGES = (
    OptionalPackage("triton", "triton", "on GPUs: model.compile, own kernels, and those of Liger"),
    OptionalPackage("flash-attn", "flash_attn", "attention"),
    OptionalPackage("flash-attn-3", "flash_attn_interface", "attention on Hopper"),
    OptionalPackage("flash-attn-4", "flash_attn.cute.interface", "attention on Hopper and Blackwell"),
    OptionalPackage("liger-kernel", "liger_kernel.ops", "norms and activation functions without model.compile"),
    OptionalPackage("transformers", "transformers", "Hugging Face tokenizers and models"),
    OptionalPackage("tokenizers", "tokenizers", "tokenizers"),
    OptionalPackage("sentencepiece", "sentencepiece", "tokenizers"),
    OptionalPackage("pyarrow", "pyarrow", "data in Parquet files"),
    OptionalPackage("tensorboard", "tensorboard", "plots of metrics"),
    OptionalPackage("boto3", "boto3", "storage in S3"),
    OptionalPackage("gcsfs", "gcsfs", "storage in GCS"),
    OptionalPackage("matplotlib", "matplotlib", "images of internlm layout"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_options(parser, required=False)
    parser.add_argument(
        "--world-size", type=int, default=1, metavar="N", help="number of ranks for the config (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the report; returns the exit code: 1 if an op has no implementation or fails its self-test."""
    settings = OpSettings(use_float8=True)  # without a config, examine all ops
    if options.world_size < 1:
        raise ConfigError(f"--world-size {options.world_size}: must be at least 1")
    if options.config is not None:
        config = load_config(options.config, options.overrides, world_size=options.world_size).config
        choose_cpu_gemm(config.model.cpu_gemm)
        settings = OpSettings.of(config.model, use_float8=config.float8.enable_float8_linear)
    elif options.overrides:
        raise ConfigError("--set overrides a key of a config: give one with --config FILE.py")
    report = examine(settings)
    print(json.dumps(report, indent=1) if options.json else _as_text(report, options.config, settings))
    return 0 if report["ok"] else 1


def examine(settings: OpSettings) -> dict[str, Any]:
    """Collect the report as JSON-serializable values."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        ops: dict[str, Any] = {name: choice._asdict() for name, choice in describe(device, settings).items()}
        problems = []
    except ConfigError as error:
        ops, problems = {}, [str(error)]
    tests = [] if problems else [{**asdict(one), "dtype": _short(one.dtype)} for one in self_tests(device, settings)]
    problems += [f"{one['op']}, {one['name']}, {one['dtype']}: {one['problem']}" for one in tests if one["problem"]]
    return {
        "machine": _machine(),
        "gpus": _gpus(),
        "software": _software(),
        "packages": [_package(package) for package in PACKAGES],
        "compilation": _compilation(device),
        "own_triton_kernels": why_no_triton(device) or "usable",
        "communication": _communication(),
        "device": device.type,
        "ops": ops,
        "attention_backends": _attention_backends(device, settings),
        "self_test": tests,
        "problems": problems,
        "ok": not problems,
    }


def _machine() -> dict[str, Any]:
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    # These names are private to PyTorch; versions without them are reported as lacking the units.
    found = {name: getattr(torch.cpu, name, None) for name in units}
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "waiting": waiting_of_threads(),
        "memory_gib": _memory_gib(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "bf16_units": bool(found[units[0]] and found[units[0]]()),  # type: ignore[misc]
        "amx": bool(found[units[1]] and found[units[1]]()),  # type: ignore[misc]
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        gpus.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{capability[0]}.{capability[1]}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "bf16": capability >= (8, 0),
                "float8": capability >= (8, 9),
            }
        )
    return gpus


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return "none: this PyTorch is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:
        return f"none: {str(error).strip().splitlines()[0]}"
    return "none: no device is visible"


def _software() -> dict[str, str | None]:
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    nccl = torch.cuda.nccl.version() if torch.version.cuda and dist.is_nccl_available() else None
    return {
        "internlm": internlm.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
        "numpy": version_of("numpy"),
    }


def _package(package: OptionalPackage) -> dict[str, Any]:
    problem = why_unusable(package.module)
    version = version_of(package.distribution)
    return {
        "name": package.distribution,
        "version": version,
        "usable": problem is None,
        "problem": problem,
        "purpose": package.purpose,
    }


def _compilation(device: torch.device) -> dict[str, Any]:
    """Whether `torch.compile` finds the compilers that it needs on this device."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    path = shutil.which(compiler)
    problems = [] if path else [f"no C++ compiler {compiler!r} found: install one, or name one in CXX"]
    if device.type == "cuda" and (problem := why_unusable("triton")) is not None:
        problems.append(problem)
    return {"usable": not problems, "compiler": path, "problem": "; ".join(problems) or None}


def _communication() -> dict[str, bool]:
    available = dist.is_available()
    return {"gloo": available and dist.is_gloo_available(), "nccl": available and dist.is_nccl_available()}


def _attention_backends(device: torch.device, settings: OpSettings) -> list[dict[str, Any]]:
    """Whether each attention backend can run the model's packed rows, and why not."""
    needs = settings.attention_needs(device)
    rows = []
    for backend in BACKENDS:
        problem = why_not(backend, needs, use_flash_attn=settings.use_flash_attn)
        if device.type != "cuda":
            problem = backend.why_missing() or "needs a GPU; attention has a single implementation on CPUs"
        rows.append({"name": backend.name, "usable": problem is None, "problem": problem})
    return rows


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_text(report: dict[str, Any], config: Path | None, settings: OpSettings) -> str:
    machine, software = report["machine"], report["software"]
    units = [name for name, present in (("bf16", machine["bf16_units"]), ("AMX", machine["amx"])) if present]
    gpus = [
        f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
        f"bf16 {_yes(gpu['bf16'])}, float8 {_yes(gpu['float8'])}"
        for gpu in report["gpus"]
    ]
    compilation = report["compilation"]
    facts = [
        ("system", machine["system"]),
        ("processor", f"{machine['processor']}, {machine['cores']} core(s), {machine['threads']} thread(s)"),
        ("", machine["waiting"]),
        ("", f"{machine['vector_units']}; units for {', '.join(units) if units else 'neither bf16 nor AMX'}"),
        ("memory", f"{machine['memory_gib']} GiB"),
        *((f"GPU {index}", text) for index, text in enumerate(gpus)),
        *([] if gpus else [("GPU", _why_no_gpu())]),
        *((name, version or "none") for name, version in software.items()),
        ("compilation", compilation["compiler"] if compilation["usable"] else compilation["problem"]),
        ("own Triton kernels", report["own_triton_kernels"]),
        ("communication", ", ".join(name for name, usable in report["communication"].items() if usable) or "none"),
    ]
    packages = [
        (one["name"], one["version"] or "-", "usable" if one["usable"] else one["problem"], one["purpose"])
        for one in report["packages"]
    ]
    backends = [(one["name"], "usable" if one["usable"] else one["problem"]) for one in report["attention_backends"]]
    ops = [(name, op["implementation"], op["reason"]) for name, op in report["ops"].items()]
    model = "the defaults" if config is None else str(config)
    examined = f"{_short(settings.dtype)}, head size {settings.head_dim}, from {model}"
    lines = [
        *_section("machine", facts),
        *_section("optional packages", packages),
        *_section(f"ops on {report['device']} ({examined})", ops),
        *_section("attention backends", backends),
        *_self_test(report["self_test"]),
        "",
        *(f"PROBLEM: {problem}" for problem in report["problems"]),
        "all ops pass" if report["ok"] else f"{len(report['problems'])} problem(s)",
    ]
    return "\n".join(lines)


def _section(title: str, rows: Iterable[Sequence[Any]]) -> list[str]:
    texts = [tuple(map(str, row)) for row in rows]
    return [title, *(text_table(texts, "<" * len(texts[0])) if texts else []), ""]


def _self_test(tests: Sequence[dict[str, Any]]) -> list[str]:
    """One line per op: the number of cases, and how many failed."""
    rows = []
    for name in dict.fromkeys(one["op"] for one in tests):
        cases = [one for one in tests if one["op"] == name]
        failed = [one for one in cases if one["problem"]]
        rows.append((name, f"{len(cases)} case(s)", f"{len(failed)} WRONG" if failed else "ok"))
    return _section("self-test, forward and backward, against the formulas in float64", rows)[:-1]


def _yes(value: bool) -> str:
    return "yes" if value else "no"
