"""`internlm verify`: its table, its verdict and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import write_config

import internlm.commands.verify as command
from internlm.cli import main
from internlm.verify.case import Combination

# A layer norm that is a little off on every rank but the first.
WRONG_MODEL = """
import torch.distributed as _dist
from internlm.model.families.internlm2 import internlm2 as _internlm2
from internlm.model.registry import register_model as _register_model

@_register_model("WRONG")
def _wrong(config, norm_dtype):
    model = _internlm2(config, norm_dtype)
    def hook(module, arguments, output):
        return output * (1.001 if _dist.is_initialized() and _dist.get_rank() > 0 else 1.0)
    model.norm.register_forward_hook(hook)
    return model

model_type = "WRONG"
"""


def verify(*arguments: object) -> int:
    return main(["verify", *map(str, arguments)])


def test_equal_layouts_end_with_0_and_a_table_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    code = verify("--config", config, "--world-size", 2, "--steps", 2, "--layout", "zero=1", "--layout", "pipeline=2")
    output = capsys.readouterr().out
    assert code == 0, output
    assert output.count("equal to one process: losses, gradient norm, every gradient and every weight") == 2
    for title in ("2 rank(s), zero=1", "2 rank(s), pipeline=2"):
        lines = output[output.index(title) :].splitlines()
        assert lines[1].split() == ["step", "loss", "one", "process", "norm", "gradients", "weights", "of", "allowed"]
        assert [line.split()[0] for line in lines[2:4]] == ["1", "2"]


EXPERTS = """
model_type = "QWEN3MOE"
model.update(num_experts=8, top_k=2, moe_type="Dropless", dtype="torch.bfloat16")
"""


def test_experts_in_bf16_are_compared_at_equal_routing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, EXPERTS)
    code = verify("--config", config, "--world-size", 2, "--steps", 2, "--layout", "expert=2", "--keep-dtype")
    output = capsys.readouterr().out
    assert code == 0, output
    assert "2 rank(s), expert=2; bfloat16, with the routing of one process" in output


FLOAT8 = """
model.update(hidden_size=64, intermediate_size=96, dtype="torch.bfloat16")
float8 = dict(enable_float8_linear=True, first_and_last_layer=True)
"""


def test_float8_is_compared_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, FLOAT8)
    code = verify("--config", config, "--world-size", 2, "--steps", 1, "--layout", "tensor=2,mode=isp", "--layout", "")
    titles = [line for line in capsys.readouterr().out.splitlines() if "rank(s)" in line]
    assert code == 0
    assert titles == [
        "2 rank(s), tensor=2,mode=isp",
        "2 rank(s), tensor=2,mode=isp; float8, in float64",
        "2 rank(s), data parallel",
        "2 rank(s), data parallel; float8, in float64",
    ]


def test_a_difference_ends_with_1_and_names_the_parameter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = verify("--config", write_config(tmp_path, WRONG_MODEL), "--world-size", 2, "--steps", 1)
    output = capsys.readouterr().out
    assert code == 1
    assert "2 rank(s), data parallel" in output
    assert "step 1: gradient norm differs by" in output
    assert "step 1: gradient of tok_embeddings.weight differs by" in output
    assert "gradient summed over data" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "tenso=2"], "Did you mean 'tensor'?"),
        (["--world-size", "3", "--layout", "pipeline=2"], "error: --layout pipeline=2: "),
        (["--layout", "pipeline=2,schedule=zbh1,chunks=2"], "--layout pipeline=2,schedule=ZBH1,chunks=2: "),
        (["--steps", "0"], "--steps 0"),
        (["--world-size", "1000"], "1 to 32"),
        (["--set", "model.num_layer=2"], "num_layers"),
        (["--matrix"], "remove --config"),
        (["--full"], "--matrix"),
    ],
)
def test_mistakes_end_with_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify("--config", write_config(tmp_path), *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_config_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify() == 2
    assert "--config" in capsys.readouterr().err


def test_the_matrix_is_a_markdown_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Combination(), Combination.parse("ranks=2 layout:zero=1 model:tied")]
    monkeypatch.setattr(command, "pairwise_matrix", lambda: rows[:1])
    monkeypatch.setattr(command, "expert_matrix", lambda: rows[1:])
    assert verify("--matrix", "--steps", 1, "--output", tmp_path / "table.md") == 0
    assert "2: equal  ranks=2 layout:zero=1 model:tied=true" in capsys.readouterr().out
    table = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[0] == "2 of 2 combinations train as one process does."
    assert table[-2].startswith("| 1 | all defaults | 0.0e+00 |")
    assert table[-1].startswith("| 2 | layout:zero=1<br>model:tied=true |") and table[-1].endswith("| equal |")
