"""Four ways to a score agree: a run's evaluation, its questions, `internlm eval`, and the server's log-probabilities.

And with lm-evaluation-harness on transformers' model of the exported checkpoint, which shares no code with them.
"""

from __future__ import annotations

import http.client
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from helpers.commands import metrics_of, start_training, write_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from internlm.apis.generation import generate
from internlm.apis.sampling import Sampling
from internlm.cli import main
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.eval.endings import encode_endings
from internlm.serve.app import create_app
from internlm.serve.engine_thread import EngineThread
from internlm.serve.language_model import LanguageModel, load_language_model
from internlm.serve.served_model import ServedModel, ServedModels, ServerSettings

TASKS = Path(__file__).parents[2] / "configs" / "tasks"
LENGTH = 96
CLOSE = 1e-5
"""Log-probabilities around 5 in fp32 are off by some 1e-6, those of a sum have about the same relative error."""


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


TEXTS = [row["text"] for row in rows_of("proverbs")]
QUESTIONS = rows_of("capitals")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and a run that was evaluated at its end: `run` and `checkpoints`."""
    folder = tmp_path_factory.mktemp("agree")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The capital of the early bird is a rolling stone"] * 3, trainer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "texts").mkdir()
    with TokenizedWriter(folder / "texts" / "a.bin") as writer:
        for text in TEXTS:
            writer.write([tokenizer.token_to_id("<s>"), *tokenizer.encode(text).ids])
    data = {
        "seq_len": LENGTH,
        "total_steps": 3,
        "valid_every": 3,
        "tokenizer_path": str(folder / "tokenizer"),
        "valid_folder": {"texts": str(folder / "texts")},
        "multiple_choice": {"questions": str(TASKS / "capitals.jsonl")},
    }
    # Ids from 300 on are the padding of the vocabulary, and a large rate makes choices clear.
    more = f"model.update(vocab_size=320)\ndata.update({data!r})\nadam.update(lr=0.03)\nckpt['checkpoint_every'] = 3\n"
    process = start_training(
        ["--config", write_config(folder, more), "--run-dir", folder / "run"], folder / "output.txt"
    )
    assert process.wait() == 0, process.output
    return folder


@pytest.fixture(scope="module")
def of_run(folder: Path) -> dict[str, float]:
    (found,) = (line for line in metrics_of(folder / "run") if "val/texts_bpb" in line)
    return found


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    language = load_language_model(str(folder / "checkpoints"), device="cpu")
    engine = EngineThread(language, max_length=LENGTH)
    app = create_app(ServedModels([ServedModel(engine, "tiny")], ServerSettings()))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()
    engine.close()


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def eval_scores(folder: Path, output: Path, *options: str) -> dict[tuple[str, str], float]:
    command = ["eval", "--ckpt", str(folder / "checkpoints"), "--device", "cpu", "--task-files", str(TASKS)]
    assert main([*command, "--output", str(output), *options]) == 0
    rows = json.loads(output.read_text())["scores"]
    return {(row["task"], row["metric"]): row["value"] for row in rows}


def test_a_run_and_its_checkpoint_agree(folder: Path, of_run: dict[str, float], tmp_path: Path) -> None:
    """Bits per byte, and both accuracies of questions."""
    found = eval_scores(folder, tmp_path / "scores.json", "--tasks", "capitals,proverbs")
    assert found["proverbs", "bits_per_byte"] == pytest.approx(of_run["val/texts_bpb"], rel=CLOSE)
    assert found["capitals", "acc"] == of_run["val/questions_choice_acc"]
    assert found["capitals", "acc_norm"] == of_run["val/questions_choice_acc_norm"]


def echoed(port: int, prompts: list[list[int]]) -> list[list[float]]:
    """The log-probability of each token but the first, by the server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1}
    connection.request("POST", "/v1/completions", json.dumps(body))
    choices = json.loads(connection.getresponse().read())["choices"]
    return [choice["logprobs"]["token_logprobs"][1:] for choice in choices]


def test_a_run_and_its_server_agree(folder: Path, of_run: dict[str, float], port: int) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    texts = [[0, *tokenizer.encode(text).ids] for text in TEXTS]
    bits = -sum(map(math.fsum, echoed(port, texts))) / math.log(2)
    assert bits / sum(len(text.encode()) for text in TEXTS) == pytest.approx(of_run["val/texts_bpb"], rel=CLOSE)
    right = right_norm = 0
    bits_per_byte = []
    for question in QUESTIONS:
        choices = question["choices"]
        endings = encode_endings(
            [(question["context"], choice) for choice in choices],
            lambda texts: [tokenizer.encode(text).ids for text in texts],
            0,
        )
        values = echoed(port, [ending.ids for ending in endings])
        sums = [math.fsum(each[ending.start - 1 :]) for each, ending in zip(values, endings, strict=True)]
        normed = [value / len(choice) for value, choice in zip(sums, choices, strict=True)]
        right += sums.index(max(sums)) == question["answer"]
        right_norm += normed.index(max(normed)) == question["answer"]
        gold = question["answer"]
        bits_per_byte.append(-sums[gold] / math.log(2) / len(choices[gold].encode()))
    assert of_run["val/questions_choice_acc"] == right / len(QUESTIONS)
    assert of_run["val/questions_choice_acc_norm"] == right_norm / len(QUESTIONS)
    assert of_run["val/questions_gold_bpb"] == pytest.approx(sum(bits_per_byte) / len(QUESTIONS), rel=CLOSE)


def greedy(language: LanguageModel, ids: list[int], count: int) -> list[int]:
    """What the model writes behind tokens."""
    sampling = Sampling(max_new_tokens=count, num_tokens=language.tokenizer.vocab_size)
    return generate(language.model, [ids], sampling)[0][0].new_ids


def harness_scores(model: Any, *names: str) -> dict[tuple[str, str], float]:
    """What lm-evaluation-harness says with another of its models."""
    from internlm.serve.harness_tasks import load_tasks, score_tasks

    scores = score_tasks(model, load_tasks(names, TASKS), seed=1234)
    return {(score.task, score.metric): score.value for score in scores}


def test_transformers_on_the_export_agrees(folder: Path, tmp_path: Path) -> None:
    """Scores of endings and texts, also of those that are cut, and generated texts."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from internlm.serve.harness import HarnessModel

    exported = str(tmp_path / "hf")
    command = ["convert", "to-hf", "--ckpt", str(folder / "checkpoints"), "--out", exported, "--layout", "transformers"]
    assert main(command) == 0
    tokenizer = str(folder / "tokenizer")
    language = load_language_model(str(folder / "checkpoints"), device="cpu")
    for length in (LENGTH, 12):
        theirs = HFLM(pretrained=exported, tokenizer=tokenizer, device="cpu", dtype="float32", max_length=length)
        names = ("capitals", "proverbs", "counting") if length == LENGTH else ("capitals", "proverbs")
        expected = harness_scores(theirs, *names)
        ours = eval_scores(folder, tmp_path / f"{length}.json", "--tasks", ",".join(names), "--max-length", str(length))
        assert ours == pytest.approx(expected, rel=CLOSE)
        assert {task for task, _ in ours} == set(names)
        ours_too = HarnessModel(language, max_length=length)
        pairs = [("a rolling", " stone gathers no"), ("", "moss"), ("the early bird\n\n", "catches"), ("a", "b")]
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        for one, other in zip(ours_too.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
            assert one == (pytest.approx(other[0], rel=CLOSE), other[1])
        # Endings that the model itself would write.
        tokens = [(("", ""), ids, greedy(language, ids, 3)) for ids in ([60, 61], [70, 71, 72, 73])]
        expected_of = theirs._loglikelihood_tokens(tokens)
        for one, other in zip(ours_too._loglikelihood_tokens(tokens), expected_of, strict=True):
            assert one == (pytest.approx(other[0], rel=CLOSE), True) and other[1] is True
        settings = [{"until": until, "max_gen_toks": 9} for until in (["\n"], ["e", "st"], [])]
        asked = [
            Instance("generate_until", {}, (context, each), 0)
            for context in ("a rolling stone", "the early bird catches the worm, and so on and on")
            for each in settings
        ]
        assert ours_too.generate_until(asked) == theirs.generate_until(asked)
    assert json.loads((tmp_path / "12.json").read_text())["requests"]["cut"] > 0


def test_the_harness_over_http_agrees(folder: Path, port: int, tmp_path: Path) -> None:
    """Its own client of completions, in front of the server."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    theirs = LocalCompletionsAPI(
        model="tiny",
        base_url=f"http://127.0.0.1:{port}/v1/completions",
        # With the server's own tokenizer ("remote"), a bos of id 0 would not be the token of an empty context.
        tokenizer_backend="huggingface",
        tokenizer=str(folder / "tokenizer"),
        batch_size=4,
    )
    names = ("capitals", "proverbs", "counting")
    ours = eval_scores(folder, tmp_path / "ours.json", "--tasks", ",".join(names))
    assert harness_scores(theirs, *names) == pytest.approx(ours, rel=CLOSE)
