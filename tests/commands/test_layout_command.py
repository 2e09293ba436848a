"""`internlm layout` shows thousands of ranks on a screen, from one process and without a process group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.commands import write_config

from internlm.cli import main
from internlm.core.scheduler.schedules import make_schedule
from internlm.core.scheduler.simulator import simulate
from internlm.core.scheduler.timeline_drawing import draw_text
from internlm.initialize.layout_report import format_ranks

PIPELINE = """
model["num_layers"] = 40
data["micro_num"] = 16
parallel = dict(zero1=dict(size=4), tensor=dict(size=2, mode="mtp"), pipeline=dict(size=8))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("layout"), PIPELINE)


def layout(capsys: pytest.CaptureFixture[str], config: Path, *arguments: object) -> list[str]:
    """The lines that the command prints."""
    assert main(["layout", "--config", str(config), *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def row(lines: list[str], first: str) -> list[str]:
    """The cells of the first line that starts with a word."""
    return next(line.split() for line in lines if line.split()[:1] == [first])


def test_thousands_of_ranks_on_a_screen(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = layout(capsys, config, "--world-size", 4096, "--width", 120)
    assert not dist.is_initialized()
    assert len(lines) <= 50 and max(map(len, lines)) <= 120
    assert lines[0] == "tiny: INTERNLM2 on 4,096 rank(s)"
    assert row(lines, "pipeline") == ["pipeline", "8", "512", "0,512,..,3584"]
    assert row(lines, "data") == ["data", "256", "16", "0,2,..,510"]
    assert row(lines, "zero") == ["zero", "4", "1,024", "0,2,4,6"]
    assert row(lines, "tensor") == ["tensor", "2", "2,048", "0-1"]
    assert row(lines, "data_replica") == ["data_replica", "64", "64", "0,8,..,504"]
    assert sum(line.split()[:1] == ["data"] for line in lines) == 1, "the weight view has the same"
    assert row(lines, "expert_data")[:2] == ["expert_data", "512"]
    assert row(lines, "0")[1:5] == ["0-511", "embedding", "+", "0-4"]
    assert row(lines, "7")[1:5] == ["3584-4095", "35-39", "+", "head"]


def test_an_offloaded_state_is_counted_on_the_host(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its columns are empty, and there is another one; fp32 weights then have masters, of half the bytes of moments."""
    resident = row(layout(capsys, config, "--world-size", 64), "0")
    offloaded = ("--set", "hybrid_zero_optimizer.offload_optimizer=True")
    lines = layout(capsys, config, "--world-size", 64, *offloaded)
    assert row(lines, "ranks")[-3:] == ["on", "the", "host"]
    *_, masters, _, moments, _, _, _, host, _ = row(lines, "0")
    assert (masters, moments) == ("0.00", "0.00")
    assert float(host) == pytest.approx(1.5 * float(resident[-4]), abs=0.015)


def test_bytes_sent_are_shown_by_axis(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An axis over which nothing is sent is left out."""
    lines = layout(capsys, config, "--world-size", 64, "--rank", 13)
    (line,) = [line for line in lines if line.startswith("rank 13 sends ")]
    total, by_axis = line.removeprefix("rank 13 sends ").removesuffix(")").split(" per step (")
    sizes = {part.split()[0]: size_of(part.split(maxsplit=1)[1]) for part in by_axis.split(", ")}
    assert list(sizes) == ["tensor", "data", "pipeline"]
    assert size_of(total) == pytest.approx(sum(sizes.values()), rel=0.01)
    assert any(line.startswith("rank 13 holds ") for line in lines)


def size_of(text: str) -> float:
    """MiB of "1.50 GiB"."""
    number, unit = text.split()
    return float(number.replace(",", "")) * {"MiB": 1, "GiB": 1024}[unit]


def test_a_rank_shows_its_own_groups(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = layout(capsys, config, "--world-size", 64, "--rank", 13)
    assert "activation view, outermost axis first; rank 13 is at pipeline 1, data 2, tensor 1" in lines
    assert row(lines, "tensor")[-1] == "12-13"
    assert row(lines, "data")[-1] == "9,11,13,15"
    assert row(lines, "pipeline")[-1] == "5,13,..,61"


def test_who_shares_a_sample_and_who_the_weights(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = ("--set", "parallel.context.size=2")
    lines = layout(capsys, config, "--world-size", 64, "--rank", 13, *context)
    assert row(lines, "sample") == ["sample", "4", "16", "12-15"]
    assert row(lines, "context") == ["context", "2", "32", "13,15"]
    data = [line.split() for line in lines if line.split()[:1] == ["data"]]
    assert data == [["data", "2", "32", "9,13"], ["data", "4", "16", "9,11,13,15"]], "activation and weight view"
    assert not any(line.split()[:1] == ["sample"] for line in layout(capsys, config, "--world-size", 64))


def test_layers_that_predict_later_tokens_are_in_the_last_stage(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = ("--set", "model.num_nextn_predict_layers=2")
    lines = layout(capsys, config, "--world-size", 64, "--rank", 63, *later)
    assert row(lines, "6")[2] == "30-34" and row(lines, "7")[2:5] == ["35-41", "+", "head"]
    plain = layout(capsys, config, "--world-size", 64, "--rank", 63)
    for start in ("rank 63 holds at most ", "rank 63 sends "):
        with_later, without = (
            size_of(" ".join(next(line for line in output if line.startswith(start)).removeprefix(start).split()[:2]))
            for output in (lines, plain)
        )
        assert with_later > without


def test_a_sample_that_context_ranks_do_not_divide_is_padded(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in training: 32 tokens, and one of padding."""
    alone = ("--set", "parallel.tensor.size=1", "--set", "parallel.pipeline.size=1")
    context = ("--set", "parallel.context.size=3", "--set", "parallel.zero1.size=-1")
    lines = layout(capsys, config, "--world-size", 3, *alone, *context)
    assert next(line for line in lines if line.startswith("context: ")).startswith("context: 3 ranks with 11 tokens")


def test_the_timeline_is_that_of_the_schedule(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = layout(capsys, config, "--world-size", 64, "--width", 200, "--set", "parallel.pipeline.mode=zbv")
    timeline = simulate(make_schedule("ZBV", 8, 16, 2))
    assert lines[-8:] == draw_text(timeline, 200).splitlines()
    # 7 of the 103 units of time, see test_zb_v_has_no_bubble.
    assert "step: ZB-V, 16 micro-batch(es), 6.8% bubble" in lines
    assert "peak number of live micro-batches, by pipeline rank: 8 8 8 8 8 8 8 8" in lines
    assert row(lines, "0")[1:9] == ["0-7", "embedding", "+", "0-1", "+", "37-39", "+", "head"]


def test_one_rank(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["parallel.pipeline.size=1", "parallel.tensor.size=1", "parallel.zero1.size=1", "data.micro_num=2"]
    lines = layout(capsys, config, "--world-size", 1, *(word for change in changes for word in ("--set", change)))
    assert "activation view, outermost axis first" in lines
    assert "step: no pipeline, 2 micro-batch(es), 0.0% bubble" in lines
    assert lines[-1] == "rank 0  F0 B0--- F1 B1---"


def test_a_deep_pipeline_shows_its_ends(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = layout(capsys, config, "--world-size", 320, "--set", "parallel.pipeline.size=40")
    assert len(lines) <= 60
    places = [line.split()[0] for line in lines if line.endswith("iB")]
    assert places == [str(place) for place in (*range(8), *range(32, 40))]
    assert any(line.startswith("rank 39") for line in lines) and not any(line.startswith("rank 20") for line in lines)


def test_picture(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "step.png"
    assert layout(capsys, config, "--world-size", 64, "--png", path)[-1] == f"image: {path}"
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "0"], "--world-size 0: must be at least 1"),
        (["--world-size", "16", "--rank", "16"], "--rank 16: must be from 0 to 15"),
        (["--world-size", "12"], "parallel.pipeline.size = 8"),
        (["--world-size", "64", "--set", "model.num_chunks=5", "--set", "data.micro_num=9"], "data.micro_num"),
        (["--world-size", "64", "--set", "parallel.pipeline.layer_split=[40]"], "parallel.pipeline.layer_split"),
    ],
)
def test_mistakes_end_with_code_2_and_their_name(
    config: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layout", "--config", str(config), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "3"),
        ([0, 1], "0-1"),
        (range(8), "0-7"),
        ([0, 8], "0,8"),
        ([0, 8, 16], "0,8,16"),
        (range(0, 64, 8), "0,8,..,56"),
        ([0, 1, 4, 5], "0-1,4-5"),
        ([r + s for r in range(0, 80, 8) for s in range(2)], "0-1,8-9,..,72-73"),
        ([0, 2, 5], "0,2,5"),
    ],
)
def test_ranks_in_few_characters(ranks: list[int], text: str) -> None:
    assert format_ranks(ranks) == text


EXPERTS = """
model_type = "QWEN3MOE"
model.update(num_experts=128, top_k=8, moe_type="Dropless", hidden_size=2048, moe_intermediate_size=768, num_layers=4)
data.update(seq_len=4096, micro_bsz=1)
parallel = dict(expert=dict(size=8))
"""


def test_experts_are_shown_with_what_they_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = layout(capsys, write_config(tmp_path, EXPERTS), "--world-size", 16, "--set", "model.dtype=torch.bfloat16")
    first = next(number for number, line in enumerate(lines) if line.startswith("experts: "))
    assert max(map(len, lines[first:])) <= 120
    text = " ".join(lines)
    assert "experts: 128 in each of 4 layer(s), 16 of them on a rank; 8 for each token" in text
    assert (
        "rank 0 routes 4,096 tokens, and its experts compute 32,768 rows if all get equally many, at most 262,144"
        in text
    )
    # 4 k T h b (n-1)/n bytes, and 3 E h f (2 b + g) (n-1)/n.
    rows, weights = 4 * 8 * 4096 * 2048 * 2 * 7 / 8, 3 * 128 * 2048 * 768 * 8 * 7 / 8
    assert f"(parallel.expert), it sends {rows / 2**20:,.2f} MiB of rows; with gathered ones" in text
    assert (
        f"{weights / 2**30:.2f} GiB of weights and gradients: rows are fewer bytes here; rows are up to 36,864 tokens"
        in text
    )
    assert " GiB if its experts get those of all ranks" in text
    (sent,) = [line for line in lines if line.startswith("rank 0 sends ")]
    assert f"expert {rows * 4 * 2 / 2**30:.2f} GiB" in sent
