"""`--text_input_path X --bin_output_path Y` gives the ids of InternEvo's tool, restated here from its format."""

import json

import pytest
import sentencepiece
from helpers.texts import documents_of, make_texts

from internlm.data.tokenize.command import main
from internlm.data.tokenized_files.tokenizer_record import read_record


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tokenizer that preserves every space, so that stripping shows."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(make_texts(200)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "m"), vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model")), folder / "m.model"


def run(model, source, output, *options):
    arguments = ["--text_input_path", source, "--bin_output_path", output, "--tokenizer_path", model[1], *options]
    return main([*map(str, arguments), "--processes", "1"])


def expected(model, texts):
    return [[model[0].bos_id(), *model[0].encode(text), model[0].eos_id()] for text in texts]


def test_txt(tmp_path, model, capsys):
    (tmp_path / "a.txt").write_text("  the model  reads \n\n\ttokens\t\n   \nand predicts\r\n", encoding="utf-8")
    assert run(model, tmp_path / "a.txt", tmp_path / "a.bin") == 0
    assert documents_of(tmp_path / "a.bin") == expected(model, ["the model  reads", "tokens", "and predicts"])
    assert read_record(tmp_path / "a.bin").add_bos
    assert "like InternEvo's tool, this starts documents with bos" in capsys.readouterr().err
    assert run(model, tmp_path / "a.txt", tmp_path / "a.bin") == 2  # InternEvo's appends without asking
    assert "exists" in capsys.readouterr().err
    assert run(model, tmp_path / "a.txt", tmp_path / "b.bin", "--no-bos") == 0
    assert documents_of(tmp_path / "b.bin")[0][0] != model[0].bos_id()


def test_json_records_are_texts_and_raw_json_on_request(tmp_path, model, capsys):
    records = [{"text": "the model  reads"}, {"id": 7, "text": "café 你好\n"}]
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    for name in ("a.jsonl", "a.json"):
        output = tmp_path / f"{name}.bin"
        assert run(model, tmp_path / name, output) == 0
        assert documents_of(output) == expected(model, [record["text"] for record in records])
        assert "--raw-json" in capsys.readouterr().err
    for name, texts in (("a.jsonl", lines), ("a.json", [json.dumps(record) for record in records])):
        output = tmp_path / f"{name}.raw.bin"
        assert run(model, tmp_path / name, output, "--raw-json") == 0
        assert documents_of(output) == expected(model, texts)


def test_internevos_options_need_a_tokenizer(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    assert main(["--text_input_path", str(tmp_path / "a.txt"), "--bin_output_path", str(tmp_path / "a.bin")]) == 2
    assert "tools/tokenizer_internlm.model: name that file" in capsys.readouterr().err
