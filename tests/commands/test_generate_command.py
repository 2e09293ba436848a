"""`internlm generate` from a checkpoint folder and a tokenizer to text on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from helpers.runs import new_trainer
from helpers.tiny import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from internlm.apis.generation import generate
from internlm.apis.sampling import Sampling
from internlm.checkpoint.load_model import load_model_for_inference
from internlm.checkpoint.reading import CONFIG_FILE
from internlm.cli import main
from internlm.config.schema import Config
from internlm.model.decoder import Decoder

VOCAB = 300
PROMPT = "naïve text"
NEW = 30


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with a beginning and an end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["some text to learn merges from, and then some more text"] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def save(
    folder: Path,
    tokenizer_path: Path | None,
    seed: int = 7,
    spoil: Callable[[Any], object] = lambda model: None,
    **model: object,
) -> Path:
    """A checkpoint of the tiny model, untrained, as a run saves it."""
    keys = {"vocab_size": VOCAB, **model}
    trainer = new_trainer(folder, 1, seed=seed, **keys)
    data: dict[str, object] = {"seq_len": 32, "micro_bsz": 1, "total_steps": 1}
    if tokenizer_path is not None:
        data["tokenizer_path"] = str(tokenizer_path)
    config = Config.model_validate(
        {"model_type": "INTERNLM2", "model": tiny_config(**keys).model_dump(mode="json"), "data": data}
    )
    with torch.no_grad():
        for parameter in trainer.engine.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)  # clear choices instead of an even distribution
        spoil(trainer.engine.model)
    assert trainer.checkpointer is not None
    trainer.checkpointer.files[CONFIG_FILE] = json.dumps(config.model_dump(mode="json"))  # type: ignore[attr-defined]
    trainer.save_checkpoint()
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    return save(tmp_path_factory.mktemp("run"), tokenizer_path)


def expected_text(checkpoint: Path, tokenizer_path: Path, with_bos: bool = False, **choices: Any) -> str:
    model, _ = load_model_for_inference(checkpoint)
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    eos = tokenizer.token_to_id("</s>")
    ids = tokenizer.encode("<s>" * with_bos + PROMPT).ids
    sampling = Sampling(max_new_tokens=NEW, eos_ids=(eos,), num_tokens=tokenizer.get_vocab_size(), **choices)
    text = generate(model, [ids], sampling)[0][0]
    return tokenizer.decode(text.new_ids[: text.num_readable], skip_special_tokens=False)


def test_greedy_text(checkpoint: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--ckpt", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", str(NEW), "--greedy"]
    texts = []
    for extra in ([], ["--bos"]):
        assert main([*arguments, "--device", "cpu", *extra]) == 0
        texts.append(expected_text(checkpoint, tokenizer_path, with_bos=bool(extra)))
        assert capsys.readouterr().out == PROMPT + texts[-1] + "\n"
    assert len(texts[0]) > 5 and texts[0] != texts[1]


def test_a_prompt_that_spells_the_beginning_of_text_has_it_once(
    checkpoint: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = f"<s>{PROMPT}"
    command = ["generate", "--ckpt", str(checkpoint), "--prompt", prompt, "--max-new-tokens", str(NEW), "--greedy"]
    assert main([*command, "--device", "cpu", "--bos"]) == 0
    assert capsys.readouterr().out == f"{prompt}{expected_text(checkpoint, tokenizer_path, with_bos=True)}\n"


def test_sampling_is_a_function_of_the_seed(
    checkpoint: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--ckpt", str(checkpoint), "--max-new-tokens", str(NEW), "--device", "cpu"]
    choices = ["--temperature", "0.7", "--top-k", "50", "--top-p", "0.9"]
    texts = [
        expected_text(
            checkpoint,
            tokenizer_path,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            top_p=0.9,
            seed=seed,
        )
        for seed in (5, 6)
    ]
    assert texts[0] != texts[1]
    assert main([*arguments, *choices, "--seed", "5", "--prompt", PROMPT, "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out == f"{PROMPT}{texts[0]}\n\n{PROMPT}{texts[1]}\n"


def test_the_end_of_text_is_not_shown(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save(tmp_path, tokenizer_path)
    # The tokenizer names as its end the third token that greedy decoding makes here.
    model, _ = load_model_for_inference(checkpoint)
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    ids = tokenizer.encode(PROMPT).ids
    new = generate(model, [ids], Sampling(max_new_tokens=NEW))[0][0].new_ids
    third = new.index(new[2])
    (tmp_path / "tokenizer.json").write_text(tokenizer_path.read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": tokenizer.id_to_token(new[2])})
    )
    arguments = ["generate", "--ckpt", str(checkpoint), "--prompt", PROMPT, "--greedy", "--device", "cpu"]
    assert main([*arguments, "--tokenizer", str(tmp_path)]) == 0
    assert capsys.readouterr().out == PROMPT + tokenizer.decode(new[:third], skip_special_tokens=False) + "\n"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--greedy", "--top-k", "5"], "no effect on greedy decoding"),
        (["--top-p", "1.5"], "--top-p 1.5: must be above 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--ckpt", "nowhere"], "no checkpoint at 'nowhere'"),
        (["--tokenizer", "nowhere.json"], "nowhere.json"),
    ],
)
def test_mistakes_end_with_code_2_and_their_name(
    checkpoint: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--ckpt", str(checkpoint), "--prompt", PROMPT, "--device", "cpu"]
    assert main([*arguments, *extra]) == 2
    assert message in capsys.readouterr().err


def test_tokenizers_that_do_not_fit_are_refused(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save(tmp_path / "none", None)
    arguments = ["generate", "--prompt", PROMPT, "--device", "cpu", "--ckpt"]
    assert main([*arguments, str(checkpoint)]) == 2
    assert "give --tokenizer" in capsys.readouterr().err
    checkpoint = save(tmp_path / "small", tokenizer_path, vocab_size=100)
    assert main([*arguments, str(checkpoint)]) == 2
    assert "the model only 100" in capsys.readouterr().err


def test_an_empty_prompt_needs_the_beginning_of_text(
    checkpoint: Path, tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--ckpt", str(checkpoint), "--prompt", "", "--max-new-tokens", "3", "--device", "cpu"]
    assert main([*arguments, "--bos"]) == 0
    assert len(capsys.readouterr().out) > 1
    assert main(arguments) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_text(tokenizer_path.read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    assert main([*arguments, "--bos", "--tokenizer", str(tmp_path)]) == 2
    assert "has no beginning-of-text" in capsys.readouterr().err


def test_ids_beyond_the_tokenizer_are_never_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A vocabulary padded to a round number, as training likes it; SentencePiece has no text for the rest."""
    text = "some text to learn pieces from, and then some more text"
    with (tmp_path / "small.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text] * 20), model_writer=file, vocab_size=30, model_type="bpe", minloglevel=2
        )
    save(tmp_path / "run", None)
    words = ["generate", "--ckpt", str(tmp_path / "run"), "--tokenizer", str(tmp_path / "small.model")]
    assert main([*words, "--prompt", "some text", "--max-new-tokens", "40"]) == 0
    assert capsys.readouterr().out.startswith("some text")


def test_the_last_token_of_the_tokenizer_may_be_chosen(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        """More, the later the token is in the vocabulary."""
        return torch.arange(float(self.architecture.vocab_size)).expand(len(hidden), -1)

    checkpoint = save(tmp_path, tokenizer_path)
    monkeypatch.setattr(Decoder, "logits", logits)
    words = ["generate", "--ckpt", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "3", "--greedy"]
    assert main([*words, "--device", "cpu"]) == 0
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    last = tokenizer.get_vocab_size() - 1
    assert capsys.readouterr().out == f"{PROMPT}{tokenizer.decode([last] * 3)}\n"


def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(model: Any) -> None:
        model.get_parameter("layers.1.attention.wo.weight").view(-1)[3:5] = torch.nan

    save(tmp_path, tokenizer_path, spoil=spoil)
    for choice in ([], ["--greedy"]):
        assert main(["generate", "--ckpt", str(tmp_path), "--prompt", PROMPT, *choice]) == 2
        error = capsys.readouterr().err
        assert (
            "the model's logits contain inf or NaN; 2 of the 1,024 elements of layers.1.attention.wo.weight are"
            in error
        )
        assert "Traceback" not in error


def greedy_ids(checkpoint: Path, tokenizer_path: Path) -> tuple[Tokenizer, list[int]]:
    """The tokens that greedy decoding makes when nothing ends it."""
    model, _ = load_model_for_inference(checkpoint)
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    ids = tokenizer.encode(PROMPT).ids
    sampling = Sampling(max_new_tokens=NEW, num_tokens=tokenizer.get_vocab_size())
    return tokenizer, generate(model, [ids], sampling)[0][0].new_ids


def text_before(tokenizer: Tokenizer, ids: list[int], *ends: int) -> str:
    return tokenizer.decode(ids[: min(ids.index(end) for end in ends if end in ids)], skip_special_tokens=False)


@pytest.mark.parametrize("where", ["checkpoint", "beside the tokenizer", "options"])
def test_every_token_that_ends_a_text(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    """Instruct models end a turn with one token and a text with another: generation_config.json lists both. The
    tokenizer's own end of text is one of them, even if the list lacks it."""
    (tmp_path / "tokenizer").mkdir()
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text(tokenizer_path.read_text())
    checkpoint = save(tmp_path / "run", path)
    tokenizer, new = greedy_ids(checkpoint, path)
    end = new[2]
    command = ["generate", "--ckpt", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", str(NEW), "--greedy"]
    options = []
    if where == "options":
        options = ["--eos", tokenizer.id_to_token(290), "--eos", str(end)]
    else:
        folder = path.parent if where == "beside the tokenizer" else next(checkpoint.glob("[0-9]*")) / "hf"
        folder.mkdir(exist_ok=True)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [290, end]}))
    assert main([*command, "--device", "cpu", *options]) == 0
    assert capsys.readouterr().out == f"{PROMPT}{text_before(tokenizer, new, end, 290)}\n"
    if where == "beside the tokenizer":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [290]}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer.id_to_token(end)}))
        assert main([*command, "--device", "cpu"]) == 0
        assert capsys.readouterr().out == f"{PROMPT}{text_before(tokenizer, new, end)}\n"


def test_stop_texts(checkpoint: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--ckpt", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", str(NEW), "--greedy"]
    whole = expected_text(checkpoint, tokenizer_path)
    stop = whole[4:7]
    assert main([*command, "--device", "cpu", "--stop", "never there", "--stop", stop]) == 0
    assert capsys.readouterr().out == f"{PROMPT}{whole[: whole.index(stop)]}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eos", "</sss>"], "--eos </sss>: the tokenizer has no such token, and ids end at 290 Did you mean '</s>'?"),
        (["--eos", "300"], "--eos 300: the tokenizer has no such token"),
        (["--stop", ""], "--stop: the text must not be empty"),
    ],
)
def test_mistakes_in_what_ends_a_text(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["generate", "--ckpt", str(checkpoint), "--prompt", PROMPT, *options]) == 2
    assert message in capsys.readouterr().err


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_of_a_file_become_rows(checkpoint: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """Texts and token ids, of unequal lengths, in the order of the file, with the other fields; as one by one."""
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    ids = tokenizer.encode(PROMPT).ids
    rows = [{"prompt": "a", "id": 7}, {"prompt": ids}, {"prompt": "some more text to go on with", "id": None}]
    # As editors on Windows save it.
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8-sig", newline="\r\n")
    command = ["generate", "--ckpt", str(checkpoint), "--greedy", "--max-new-tokens", str(NEW), "--device", "cpu"]
    options = ["--prompts", str(tmp_path / "in.jsonl"), "--batch", "2", "--logprobs", "2"]
    assert main([*command, *options, "--output", str(tmp_path / "out.jsonl")]) == 0
    found = rows_of(tmp_path / "out.jsonl")
    assert [{key: row[key] for key in row if key != "completions"} for row in found] == rows
    assert [len(row["completions"]) for row in found] == [1, 1, 1]
    completion = found[1]["completions"][0]
    assert completion["text"] == expected_text(checkpoint, tokenizer_path)
    assert completion["finish_reason"] == "length" and len(completion["token_ids"]) == NEW
    assert len(completion["logprobs"]) == NEW
    first = completion["logprobs"][0]
    assert first["top"][0][1] == completion["token_ids"][0] and first["top"][0][2] == first["value"]
    assert main([*command, *options, "--output", str(tmp_path / "out.jsonl")]) == 2  # not overwritten


def test_samples_and_beams(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--ckpt", str(checkpoint), "--prompt", PROMPT, "--max-new-tokens", "8", "--device", "cpu"]
    assert main([*command, "--samples", "3", "--output", str(tmp_path / "samples.jsonl")]) == 0
    texts = [each["text"] for each in rows_of(tmp_path / "samples.jsonl")[0]["completions"]]
    assert len(set(texts)) == 3
    assert main([*command, "--samples", "3"]) == 0
    assert capsys.readouterr().out == "\n\n".join(PROMPT + text for text in texts) + "\n"
    assert (
        main([*command, "--greedy", "--beams", "3", "--samples", "2", "--output", str(tmp_path / "beams.jsonl")]) == 0
    )
    beams = rows_of(tmp_path / "beams.jsonl")[0]["completions"]
    assert beams[0]["score"] > beams[1]["score"]
    assert main([*command, "--greedy", "--beams", "3", "--samples", "2"]) == 0
    assert capsys.readouterr().out == "\n\n".join(PROMPT + each["text"] for each in beams) + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --prompt TEXT or --prompts FILE"),
        (["--prompt", "a", "--greedy", "--samples", "2"], "greedy texts of one prompt are all the same"),
        (["--prompt", "a", "--beams", "2", "--samples", "3"], "--samples 3: must be at most --beams 2"),
        (["--prompt", "a", "--beams", "2", "--stop", "x"], "--stop does not work with --beams"),
        (["--prompt", "a", "--length-penalty", "2"], "--length-penalty has no effect without --beams"),
        (["--prompt", "a", "--logprobs", "1"], "add --output FILE"),
        (
            ["--prompt", "a", "--min-new-tokens", "200"],
            "--min-new-tokens 200: must be from 0 to --max-new-tokens 100",
        ),
        (["--prompt", "a", "--logprobs", "-1", "--output", "{dir}/x"], "--logprobs -1: must be at least 0"),
        (["--prompts", "{bad}"], 'in.jsonl, line 2: must be an object with "prompt"'),
        (["--prompts", "{half}"], "half.jsonl, line 1: not a prompt: half of a surrogate pair, \\ud800, is no text"),
        (["--prompts", "{dir}/none.jsonl"], "none.jsonl: cannot be read"),
        (["--prompts", "{ids}"], "ids.jsonl, line 1: token ids must be from 0 to 299"),
        (["--prompt", "a", "--output", "{dir}/no/folder"], "--output"),
    ],
)
def test_mistakes_in_prompts(
    checkpoint: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    (tmp_path / "ids.jsonl").write_text('{"prompt": [300]}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    names = {"{half}": tmp_path / "half.jsonl", "{bad}": tmp_path / "in.jsonl", "{ids}": tmp_path / "ids.jsonl"}
    words = [str(names.get(each, each)).replace("{dir}", str(tmp_path)) for each in options]
    assert main(["generate", "--ckpt", str(checkpoint), "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err
