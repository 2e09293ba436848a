"""`internlm eval` on tasks of its own files, without network: the table, the file, what is said, and mistakes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from commands.test_generate_command import save, tokenizer_path  # noqa: F401

from internlm.cli import main

TASKS = Path(__file__).parents[2] / "configs" / "tasks"


@pytest.fixture(scope="module")
def ckpt(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return save(tmp_path_factory.mktemp("eval"), tokenizer_path)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def run(ckpt: Path, *options: object, files: Path = TASKS) -> int:
    return main(["eval", "--ckpt", str(ckpt), "--device", "cpu", "--task-files", str(files), *map(str, options)])


def test_the_table_and_the_file(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scores.json"
    assert run(ckpt, "--tasks", "capitals,proverbs,counting", "--max-length", "96", "--output", output) == 0
    captured = capsys.readouterr()
    lines = [line.split() for line in captured.out.splitlines()]
    assert lines[0] == ["task", "few-shot", "filter", "metric", "value", "stderr", "documents"]
    assert {(line[0], line[1], line[3]) for line in lines[1:]} == {
        ("capitals", "0", "acc"),
        ("capitals", "0", "acc_norm"),
        ("capitals", "0", "acc_bytes"),
        ("counting", "2", "exact_match"),
        ("proverbs", "0", "bits_per_byte"),
        ("proverbs", "0", "byte_perplexity"),
    }
    assert "on cpu in float32, up to 96 tokens at a time; contexts begin without bos; in place of" in captured.err
    assert "an empty one: '<s>'" in captured.err
    record = json.loads(output.read_text())
    assert record["requests"] == {"scored": 22, "cut": 0, "joined": 0, "generated": 3, "cut_prompts": 0}
    assert (record["dtype"], record["max_length"], record["bos"], record["seed"]) == ("float32", 96, False, 1234)
    assert {row["task"]: row["num_documents"] for row in record["scores"]} == {
        "capitals": 6,
        "proverbs": 4,
        "counting": 3,
    }
    assert "part of the documents" not in captured.err and "lost their beginning" not in captured.err


def test_what_changes_scores_is_said(ckpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit, contexts that are cut, and a number of examples that a task does not take."""
    options = ("--limit", "2", "--max-length", "20", "--num-fewshot", "1", "--seed", "7")
    assert run(ckpt, "--tasks", "capitals,proverbs", *options) == 0
    captured = capsys.readouterr()
    assert "2 of 6" in captured.out and "2 of 4" in captured.out
    assert "these are scores of a part of the documents (--limit)" in captured.err
    assert "contexts and 0 of 0 prompts lost their beginning, as the model reads 20 tokens" in captured.err
    assert "--num-fewshot 1: task 'proverbs' scores whole texts and gets no examples" in captured.err


def test_the_choice_of_examples_follows_the_seed(ckpt: Path, tmp_path: Path) -> None:
    values = []
    for number, seed in enumerate((1, 1, 2, 3, 4)):
        output = tmp_path / f"{number}.json"
        options = ("--num-fewshot", "2", "--max-length", "200", "--seed", seed, "--output", output)
        assert run(ckpt, "--tasks", "endings", *options, files=few_shot_task(tmp_path)) == 0
        values.append(json.loads(output.read_text())["scores"][0]["value"])
    assert values[0] == values[1] and len(set(values)) > 1


def few_shot_task(folder: Path) -> Path:
    """A task of log-likelihoods, whose value shows which examples are in front."""
    tasks = folder / "few_shot"
    if not tasks.exists():
        shutil.copytree(TASKS, tasks)
        text = (tasks / "proverbs.yaml").read_text().replace("task: proverbs", "task: endings")
        text = text.replace("output_type: loglikelihood_rolling", "output_type: loglikelihood\nfewshot_split: test")
        text = text.replace('doc_to_text: ""', 'doc_to_text: "Say:"').split("metric_list")[0]
        (tasks / "endings.yaml").write_text(
            text + "metric_list:\n  - metric: perplexity\n    aggregation: mean\n    higher_is_better: false\n"
        )
    return tasks


def test_prompts_as_conversations(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    output = tmp_path / "scores.json"
    options = ("--chat", "--chat-template", template, "--system", "be", "--max-length", "200", "--output", output)
    assert run(ckpt, "--tasks", "counting", *options) == 0
    record = json.loads(output.read_text())
    assert record["chat_template"] and record["system"] == "be"
    assert run(ckpt, "--tasks", "counting", "--chat") == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err


BAD_TASK = """
task: bad
dataset_path: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "x"
doc_to_choice: choices
doc_to_target: answer
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "capitols"), "--tasks: no task 'capitols' in"),
        (("--tasks", "capitals,"), "names between commas must not be empty"),
        (("--tasks", "capitals,capitals"), "has a name twice"),
        (("--tasks", "capitals", "--limit", "0"), "--limit 0"),
        (("--tasks", "capitals", "--num-fewshot", "-1"), "--num-fewshot -1"),
        (("--tasks", "capitals", "--max-length", "1"), "--max-length 1"),
        (("--tasks", "capitals", "--batch", "0"), "--batch 0"),
        (("--tasks", "capitals", "--batch-tokens", "0"), "--batch-tokens 0"),
        (("--tasks", "capitals", "--seed", "-1"), "--seed -1"),
        (("--tasks", "capitals", "--system", "x"), "--system has no effect without --chat"),
        (("--tasks", "capitals", "--chat-template", "x"), "--chat-template has no effect without --chat"),
        (("--tasks", "capitals", "--output", "/proc/nothing/x.json"), "its folder does not exist"),
        (("--tasks", "counting"), "asks for 12 new tokens"),
    ],
)
def test_mistakes_in_options(
    ckpt: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--max-length", "12") if options[1] == "counting" else ()
    assert run(ckpt, *options, *more) == 2
    assert message in capsys.readouterr().err


def test_mistakes_in_files(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(task: str = "bad") -> str:
        assert run(ckpt, "--tasks", task, files=tmp_path) == 2
        return capsys.readouterr().err

    assert "no .yaml file" in error()
    file = tmp_path / "bad.yaml"
    file.write_text("task: [")
    assert "bad.yaml: cannot be read: while parsing" in error()
    file.write_text("- 1")
    assert "bad.yaml: must be the keys of a task, is list" in error()
    file.write_text(BAD_TASK.format(path="json\ndataset_kwargs: {data_files: {test: none.jsonl}}"))
    assert f"task 'bad' cannot be loaded: Unable to find '{tmp_path}/none.jsonl'" in error()
    (tmp_path / "none.jsonl").write_text("nonsense")
    assert "task 'bad' cannot be loaded: " in error()
    file.write_text(BAD_TASK.format(path="nobody/has-this"))
    message = error()
    assert "task 'bad' cannot be loaded: " in message and "its data must be downloaded" in message
    assert run(ckpt, "--tasks", "bad", files=tmp_path / "absent") == 2
    assert "absent: no such folder" in capsys.readouterr().err


def test_output_is_not_overwritten(ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("mine")
    assert run(ckpt, "--tasks", "capitals", "--output", tmp_path / "x.json") == 2
    assert "x.json: exists" in capsys.readouterr().err and (tmp_path / "x.json").read_text() == "mine"


def test_a_missing_package_is_named(
    ckpt: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith(("internlm.serve.harness", "lm_eval"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(ckpt, "--tasks", "capitals") == 2
    assert "internlm eval needs lm_eval" in capsys.readouterr().err


def test_weights_that_give_nan_are_named(
    tokenizer_path: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def spoil(model: object) -> None:
        model.norm.weight[0] = float("nan")  # type: ignore[attr-defined]

    assert run(save(tmp_path / "run", tokenizer_path, spoil=spoil), "--tasks", "capitals") == 2
    assert "the log-probability of an ending is NaN; 1 of the 32 elements of norm.weight" in capsys.readouterr().err
