"""The throughput benchmark: its script for a GPU machine from end to end, and the arithmetic behind its table."""

from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.pages import ROOT

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.initialize.build_data import build_loader
from internlm.initialize.stages import build_meta_model

sys.path.insert(0, str(ROOT / "benchmarks"))

import throughput
from speed.ceiling import Ceiling
from speed.contenders import recomputed_flops
from speed.corpus import ARRAY, write_corpus
from speed.pacer import Finished, Pacer
from speed.report import add_ratios, make_row, markdown
from speed.shapes import DOCUMENTS, SHAPES, keys_of, write_config


def config_of(folder: Path, name: str, precision: str = "bf16", **changes: Any) -> Path:
    path = folder / "config.py"
    write_config(path, keys_of(SHAPES[name], precision, folder=str(folder / "train"), **changes))
    return path


def test_the_script_for_a_gpu_machine_runs_to_its_end_though_a_part_fails(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), "--cpu"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    doctor, tests, good, hf, llava, bad = written["notes"]
    assert doctor.startswith("doctor: passed") and tests.startswith("step: passed")
    assert good.startswith("tiny: passed") and bad.startswith("broken: failed") and "model.no_such_key" in bad
    assert hf.startswith("hf: passed") and llava.startswith("llava: passed")
    result, *others = written["results"]
    assert all("error" not in row for other in others for row in other["rows"])
    ours, short, wrong = result["rows"]
    assert wrong["contender"] == "ours, wrong" and "model.no_such_key" in wrong["error"]
    assert ours["contender"] == "ours" and ours["tokens_per_second"] > 0 and ours["times_of_limit"] > 0
    assert short["contender"] == "ours, short" and short["ours_times_its_speed"] > 0
    assert printed.strip() == (tmp_path / "gpu_check.md").read_text().strip()
    assert "| ours, short |" in printed

    # Again: what passed is left alone, what failed runs again, and so does no part of another stage.
    (tmp_path / "own.txt").write_text("mine")
    again = subprocess.run([*command, "--stage", "speed"], env=environment, capture_output=True, text=True, check=True)
    assert "tiny passed before" in again.stderr and "broken: failed" in again.stderr
    assert "doctor" not in again.stderr and "doctor: passed" in again.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"gpu_check.json", "gpu_check.md", "gpu_check.tar.gz", "own.txt"}


def plan(*options: str) -> list[str]:
    command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), "--dry-run", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_plan_has_every_cuda_test_and_ends_in_fourteen_minutes() -> None:
    lines = plan()
    # Three parts run side by side.
    seconds = {line.split()[1]: int(line.split()[2]) for line in lines}
    assert sum(seconds.values()) - seconds["layers"] - seconds["memory"] <= 14 * 60
    files = [word for line in lines for word in line.split() if word.startswith("tests/cuda")]
    assert sorted(files) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/cuda").glob("test_*.py"))
    assert all("benchmarks/" in line for line in plan("--stage", "speed"))
    assert [line.split()[1] for line in plan("--stage", "facts")] == ["doctor"]


def test_an_unknown_stage_is_refused() -> None:
    command = ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), "--stage", "fast"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--stage is facts, checks or speed, but is 'fast'" in done.stderr


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_a_config_with_a_model_of_its_size(name: str, tmp_path: Path) -> None:
    config = load_config(config_of(tmp_path, name)).config
    shape = SHAPES[name]
    weights = build_meta_model(config).named_parameters()
    size = sum(weight.numel() for name, weight in weights if not name.startswith("vision_"))
    queries, keys = shape.heads
    head_dim = shape.model.get("head_dim", shape.hidden // queries)
    experts = shape.model.get("num_experts", 1)
    layer = shape.hidden * head_dim * 2 * (queries + keys) + 3 * shape.hidden * shape.ffn * experts + 2 * shape.hidden
    if experts > 1:  # a router, and the norms of queries and keys
        layer += experts * shape.hidden + 2 * head_dim
    assert size == shape.layers * layer + 2 * shape.vocab * shape.hidden + shape.hidden


def test_sizes_of_known_models() -> None:
    """The names say what they are: InternLM2-7B has 7.74 billion parameters, Llama-3-8B 8.03."""

    def billions(name: str) -> float:
        shape = SHAPES[name]
        queries, keys = shape.heads
        layer = shape.hidden**2 * (2 + 2 * keys / queries) + 3 * shape.hidden * shape.ffn
        return (shape.layers * layer + 2 * shape.vocab * shape.hidden) / 1e9

    assert {name: round(billions(name), 2) for name in ("160m", "1b", "1.5b", "7b", "8b")} == {
        "160m": 0.16, "1b": 1.1, "1.5b": 1.48, "7b": 7.74, "8b": 8.03,
    }  # fmt: skip


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_contenders_get_the_same_tokens_in_documents_of_the_wanted_lengths(documents: str, tmp_path: Path) -> None:
    seq = 64
    write_corpus(tmp_path, documents, vocab=256, seq=seq, num_sequences=8)
    config = load_config(config_of(tmp_path, "tiny", documents=documents)).config
    batches = [next(loader) for loader in [build_loader(config, ParallelContext.create())] for _ in range(4)]
    ours = torch.cat([micro.input_ids.flatten() for batch in batches for micro in batch.micro_batches])
    # One epoch, in another order.
    assert sorted(ours.tolist()) == sorted(np.load(tmp_path / ARRAY).flatten().tolist())
    lengths = [length for batch in batches for micro in batch.segment_lengths for length in micro]
    if documents in ("one", "rows"):
        assert set(lengths) == {seq}
    else:
        assert max(lengths) <= (3 if documents == "short" else seq)
        assert len(set(lengths)) > 1


@pytest.mark.parametrize("name", ["tiny", "demo", "7b"])
def test_the_ceiling_is_over_all_products_of_the_model(name: str, tmp_path: Path) -> None:
    ceiling = Ceiling(config_of(tmp_path, name), [], torch.device("cpu"))
    shape = SHAPES[name]
    queries, keys = shape.heads
    layer = shape.hidden**2 * (2 + 2 * keys / queries) + 3 * shape.hidden * shape.ffn
    weights = sum(rows * columns * count for (rows, columns), count in ceiling.linears.items())
    assert weights == shape.layers * layer + shape.vocab * shape.hidden


def test_the_limit_is_the_sum_of_the_products_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ceiling = Ceiling(config_of(tmp_path, "tiny", micro_num=3), [], torch.device("cpu"))
    monkeypatch.setattr(ceiling, "_time", lambda product: product() is None or 1e-3)
    measured = ceiling.measure()
    # Two layers of wq, wk, wv, wo, w1, w2, w3 and a head, three products each; half of attention's two, three times.
    num_linears = 2 * 7 + 1
    assert measured["limit_seconds"] == pytest.approx(3 * (num_linears * 3e-3 + 2 * 3 * 2e-3 / 2))
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128) + 256 * 64
    assert measured["ceiling_flops"] == pytest.approx(6 * 128 * weights / (num_linears * 3e-3))


@pytest.mark.parametrize(("keep", "share"), [("nothing", 1.0), ("attention", 0.8), ("matmuls", 0.0)])
def test_what_is_computed_twice(keep: str, share: float, tmp_path: Path) -> None:
    path = config_of(tmp_path, "tiny")
    config = load_config(path, ["model.checkpoint=0.5", f"model.checkpoint_save_policy={keep}"]).config
    head = 6 * 64 * 256
    # Layers' forward passes of 100, a fifth of it attention's two products, of one of two layers.
    assert recomputed_flops(config, 360 + head, 300 + head) == pytest.approx(share * 100 / 2)
    assert recomputed_flops(load_config(path).config, 360 + head, 300 + head) == 0


def test_every_row_of_the_plan_is_a_config(tmp_path: Path) -> None:
    rows = [line for line in plan("--stage", "speed") if "throughput.py" in line]
    for number, line in enumerate(rows):
        options = throughput.parse_options(shlex.split(line.partition("throughput.py")[2]))
        folder = tmp_path / str(number)
        folder.mkdir()
        assert [contender.error for contender in throughput.make_contenders(options, folder) if contender.error] == []


def round_of(seconds: float, peak: int = 100) -> dict[str, Any]:
    return {"seconds": seconds, "peak_bytes": peak, "reserved_bytes": None, "data_share": 0.01}


FACTS = {"flops_full": 6e9, "flops_causal": 5e9, "peak_flops": 1e14}


def test_a_row_by_hand() -> None:
    facts = {**FACTS, "recomputed_flops": 1e9, "host_share": 0.2, "parameters": 7}
    ceilings = [{"ceiling_flops": 8e13, "limit_seconds": limit} for limit in (0.1, 0.2, 0.1)]
    row = make_row("ours", [round_of(0.2), round_of(0.25), round_of(0.4, 120)], facts, ceilings, tokens=1000)
    assert row["tokens_per_second_rounds"] == [5000, 4000, 2500] and row["tokens_per_second"] == 4000
    assert (row["mfu_full"], row["mfu_causal"], row["hfu_causal"]) == pytest.approx((0.24, 0.2, 0.24))
    assert (row["of_ceiling_full"], row["of_ceiling_causal"]) == pytest.approx((0.3, 0.25))
    assert row["times_of_limit"] == 2.0  # of 2, 1.25, 4
    assert row["peak_bytes"] == 120


def test_ratios_are_of_rounds_and_a_failure_is_a_line() -> None:
    rows = [
        make_row("ours", [round_of(0.1), round_of(0.4), round_of(0.1)], FACTS, [], 1000),
        make_row("hf", [round_of(0.2, 150), round_of(0.8), round_of(0.3)], FACTS, [], 1000),
        {"contender": "plain", "error": "OutOfMemoryError: no\nroom"},
    ]
    add_ratios(rows)
    # The slow second round hit both: 2, 2 and 3.
    assert rows[1]["ours_times_its_speed"] == pytest.approx(2.0) and rows[1]["its_memory_times_ours"] == 1.5
    about = {"title": "t", "command": "c", "device": "d", "torch": "2", "commit": "0"}
    page = markdown({**about, "rows": rows})
    header, *lines = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {header.count("|")}
    assert "OutOfMemoryError: no room" in lines[-1]


def test_a_pacer_counts_the_steps_of_a_round_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 10.0, 16.0])
    monkeypatch.setattr("speed.pacer.time.perf_counter", lambda: next(times))
    monkeypatch.setattr(sys, "stdin", io.StringIO("3\n"))
    out = io.StringIO()
    pacer = Pacer(out, torch.device("cpu"), warmup=2, about={"torch": "2"})
    pacer.facts = {"tokens_per_step": 7}
    steps = 0
    with pytest.raises(Finished):
        while True:
            steps += 1
            pacer.data_seconds += 0.5
            pacer.step_done()
    ready, measured = map(json.loads, out.getvalue().splitlines())
    assert ready == {"torch": "2", "tokens_per_step": 7, "warmup_seconds": 5.0}
    assert steps == 2 + 3
    assert measured["seconds"] == 2.0 and measured["data_share"] == 1.5 / 6
