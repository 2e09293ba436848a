"""Runs on blends of several kinds of data: metrics of each source, resuming with other weights, ends, the tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.chat_templates import save_chat_tokenizer
from helpers.commands import metrics_of, start_ranks, start_training, write_config

from internlm.cli import main
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.tokenized_files.writer import TokenizedWriter

TOKENS = 32
"""Of a sample; a step has two."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, draw = tmp_path_factory.mktemp("blend"), np.random.default_rng(0)
    for kind in ("web/en", "web/code", "books", "rows/en"):
        (root / kind).mkdir(parents=True)
    for name in ("en", "code"):
        with TokenizedWriter(root / "web" / name / "a.bin") as writer:
            for length in draw.integers(2, 40, 60):
                writer.write(draw.integers(1, 60, length).tolist())
    with MegatronWriter(root / "books" / "a.bin", np.dtype("uint16")) as megatron:
        for length in draw.integers(2, 40, 16):
            megatron.write(draw.integers(1, 60, length))
    texts = [f"What is {number}? The sum of two and three." for number in range(50)]
    (root / "rows" / "en" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    save_chat_tokenizer(root / "tokenizer")
    return root


def blend_of(folder: Path, web: Any = 0.5, **of_books: Any) -> list[dict[str, Any]]:
    books = {"epochs_max": 2, "on_end": "drop", **of_books}
    return [
        {"path": str(folder / "web"), "weight": web, "min_length": 4},
        {
            "weight": 0.5,
            "blend": [
                {"path": str(folder / "books"), "type": "megatron", "weight": 0.6, **books},
                {"path": str(folder / "rows"), "type": "streaming", "name": "chat", "weight": 0.4},
            ],
        },
    ]


def config_of(at: Path, folder: Path, blend: list[dict[str, Any]], steps: int, more: str = "") -> Path:
    data = {"blend": blend, "tokenizer_path": str(folder / "tokenizer"), "total_steps": steps}
    return write_config(at, f"data.update({data!r})\nmodel['vocab_size'] = 600\n{more}")


def train(at: Path, config: Path, *arguments: object, run: str = "run") -> tuple[int, str, list[dict[str, Any]]]:
    command = start_training(["--config", config, "--run-dir", at / run, *arguments], at / f"{run}.txt")
    code = command.wait()
    return code, command.output, metrics_of(at / run)


def test_metrics_have_tokens_and_epochs_of_each_source(folder: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, folder, blend_of(folder, epochs_max=1), 20, "enable_tb = True\n")
    code, output, lines = train(tmp_path, config)
    assert code == 0, output
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line in lines:
        tokens = {
            name.split("/")[1]: line[name] for name in line if name.startswith("source/") and name.endswith("/tokens")
        }
        assert tokens.keys() == {"web", "books", "chat"} and sum(tokens.values()) == line["num_consumed_tokens"]
        assert {f"source/{name}/epochs" for name, number in tokens.items() if number} <= line.keys()
    # 0.5 of the samples, as long as no source has ended.
    assert abs(lines[4]["source/web/tokens"] / TOKENS - 5) < 1
    # "books" has ended after an epoch, and its weight is shared by the others.
    assert lines[-1]["source/books/epochs"] == 1 and "'books' has ended after 1 epoch\n" in output
    assert output.count("'books' has ended") == 1
    types = {name for line in lines for name in line if name.startswith("loss/")}
    assert types == {"loss/code", "loss/web/en", "loss/books", "loss/chat/en"}
    assert "named SOURCE/TYPE in metrics: en" in output
    events = next((tmp_path / "run" / "tensorboards").iterdir()).read_bytes()
    assert b"source/web/tokens" in events and b"source/chat/epochs" in events


def numbers_of(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("loss", "source/", "tokens/", "grad_norm", "step")
    return [{name: value for name, value in line.items() if name.startswith(names)} for line in lines]


def test_a_resumed_run_is_the_same_run(folder: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "straight", folder, blend_of(folder), 16)
    code, output, straight = train(tmp_path / "straight", config)
    assert code == 0, output
    _, output, first = train(tmp_path, config_of(tmp_path, folder, blend_of(folder), 9))
    more = "data['num_worker'] = 2\n"
    code, output, second = train(tmp_path, config_of(tmp_path, folder, blend_of(folder), 16, more), run="second")
    assert code == 0 and "resuming at step 9" in output, output
    assert numbers_of(first + second) == numbers_of(straight)


def test_a_resumed_run_may_have_other_weights_and_sources(folder: Path, tmp_path: Path) -> None:
    code, output, first = train(tmp_path, config_of(tmp_path, folder, blend_of(folder), 5))
    assert code == 0, output
    other = [{"path": str(folder / "web"), "weight": 3, "min_length": 4}]
    other += [{"path": str(folder / "web" / "en"), "name": "new", "weight": 1}]
    code, output, second = train(tmp_path, config_of(tmp_path, folder, other, 15), run="second")
    assert code == 0 and "resuming at step 5" in output, output
    for text in (
        "source 'web': its share was 0.5, is 0.75 from sample 10 on",
        "the blend has a new source 'new', which starts at its first sample",
        "the blend no longer has the source 'chat', which had 2 samples",
        "blend: shares from sample 10 (token 320) on: web 0.75, new 0.25",
    ):
        assert text in output, (text, output)
    before, after = first[-1]["source/web/tokens"], second[-1]["source/web/tokens"]
    assert (after - before) / TOKENS == 15 and second[-1]["source/new/tokens"] / TOKENS == 5


def test_a_blend_that_ends_ends_the_run_on_all_ranks(folder: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, folder, blend_of(folder, on_end="stop"), 40)
    ranks = start_ranks(["--config", config, "--run-dir", tmp_path / "run"], tmp_path)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output
    lines = metrics_of(tmp_path / "run")
    assert 0 < lines[-1]["step"] < 40 and lines[-1]["source/books/epochs"] <= 2
    assert f"the training data ended at step {lines[-1]['step']} of 40" in ranks[0].output
    assert "source 'books' has ended" in ranks[0].output
    assert (tmp_path / "checkpoints" / str(lines[-1]["step"])).is_dir()


def test_a_dry_run_reads_every_source(folder: Path, tmp_path: Path) -> None:
    code, output, _ = train(tmp_path, config_of(tmp_path, folder, blend_of(folder), 5), "--dry-run")
    assert code == 0, output
    for text in ("web': 120 documents", "books': 16 documents", "rows': 50 rows", "the config is valid"):
        assert text in output, (text, output)
    blend = blend_of(folder)
    blend[1]["blend"][0]["path"] = "s3://bucket/books"
    code, output, _ = train(tmp_path, config_of(tmp_path, folder, blend, 5), "--dry-run")
    assert code == 2 and "cannot list 's3://bucket/books'" in output
    blend[1]["blend"][0]["path"] = str(folder / "nowhere")
    code, output, _ = train(tmp_path, config_of(tmp_path, folder, blend, 5), "--dry-run")
    assert code == 2 and "nowhere: no such folder" in output


def test_inspect_names_the_source_of_a_sample(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, folder, blend_of(folder), 5)
    found = []
    for number in range(4):
        assert main(["data", "inspect", "--config", str(config), "--sample", str(number)]) == 0
        found.append(capsys.readouterr().out.splitlines()[0])
    assert sum("of source web; epoch 1 of" in line for line in found) == 2
    assert any("sample 1 of source web" in line for line in found)
    assert all("; type " in line for line in found)
