"""Records of the tokenizer of a file; files of two tokenizers are not mixed."""

import json
import logging

import pytest
from helpers.texts import documents_of, make_texts, write_jsonl

from internlm.data.documents.folders import unread_files
from internlm.data.sources.open_source import open_source
from internlm.data.tokenize.command import main
from internlm.data.tokenize.fingerprint import tokenizer_fingerprint
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenize.train_bpe import train_bpe
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.tokenizer_record import common_record, read_record, record_path, tokenizer_records
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import DataError


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Two tokenizers of equal size and other ids."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, seed in (("a", 0), ("b", 5)):
        (folder / name).mkdir()
        train_bpe([text[seed:] for text in make_texts(200, seed=seed)], 290, folder / name / "tokenizer.json")
    return folder


def run(*arguments):
    return main([str(argument) for argument in (*arguments, "--processes", 1)])


def test_a_file_is_recorded_and_appended_to_by_its_own_tokenizer_only(tmp_path, tokenizers, capsys):
    text = write_jsonl(tmp_path / "t.jsonl", make_texts(10))
    first, second = tokenizers / "a" / "tokenizer.json", tokenizers / "b" / "tokenizer.json"
    output = tmp_path / "train" / "en" / "x.bin"
    assert run(text, "--tokenizer", first, "--output", output) == 0
    record = read_record(output)
    tokenizer = load_tokenizer(first)
    assert record.fingerprint == tokenizer_fingerprint(tokenizer) and record.tokenizer == str(first)
    assert (record.vocab_size, record.eos_id, record.add_bos, record.add_eos) == (290, 1, False, True)
    assert record.version and record.created.startswith("20")
    # What InternEvo's scanner takes, by suffix, is the .bin alone.
    assert [path.name for path in output.parent.iterdir() if path.name.endswith(".bin")] == ["x.bin"]
    before = documents_of(output)

    assert run(text, "--tokenizer", second, "--output", output, "--append") == 2
    error = capsys.readouterr().err
    assert str(first) in error and str(second) in error and "fingerprint" in error
    assert run(text, "--tokenizer", first, "--output", output, "--append", "--no-eos") == 2
    assert "add_eos True against False" in capsys.readouterr().err
    assert documents_of(output) == before

    assert run(text, "--tokenizer", first, "--output", output, "--append") == 0
    assert documents_of(output) == before * 2 and read_record(output) == record


def test_appending_to_a_file_without_a_record_says_so(tmp_path, tokenizers, capsys):
    text = write_jsonl(tmp_path / "t.jsonl", make_texts(3))
    with TokenizedWriter(tmp_path / "x.bin") as writer:
        writer.write([5, 6])
    options = ("--tokenizer", tokenizers / "a" / "tokenizer.json", "--output", tmp_path / "x.bin", "--append")
    assert run(text, *options) == 0
    assert "x.bin has no record of its tokenizer" in capsys.readouterr().err
    assert read_record(tmp_path / "x.bin") is None  # a record would claim the documents that were there


def test_records_of_a_folder(tmp_path, tokenizers):
    text = write_jsonl(tmp_path / "t.jsonl", make_texts(3))
    for type_name, tokenizer in (("cn", "a"), ("en", "b")):
        output = tmp_path / "train" / type_name / "x.bin"
        assert run(text, "--tokenizer", tokenizers / tokenizer / "tokenizer.json", "--output", output) == 0
    with TokenizedWriter(tmp_path / "train" / "zz" / "y.bin") as writer:
        writer.write([5, 6])
    records = tokenizer_records(tmp_path / "train")
    assert [path.name for path in records] == ["x.bin", "x.bin", "y.bin"]
    assert [record and record.vocab_size for record in records.values()] == [290, 290, None]
    with pytest.raises(DataError, match=r"cn/x\.bin and .*en/x\.bin were made by different tokenizers"):
        common_record(records)
    assert common_record(tokenizer_records(tmp_path / "train" / "cn")).fingerprint
    assert common_record(tokenizer_records(tmp_path / "train" / "zz")) is None


@pytest.mark.parametrize("content", ["[1]", "{}", "no json", '{"fingerprint": "x"}'])
def test_a_broken_record_is_named(tmp_path, content):
    with TokenizedWriter(tmp_path / "x.bin") as writer:
        writer.write([5, 6])
    record_path(tmp_path / "x.bin").write_text(content)
    with pytest.raises(DataError, match=r"x\.bin\.tokenizer\.json: not a tokenizer record"):
        read_record(tmp_path / "x.bin")


def test_a_newer_record_is_read(tmp_path, tokenizers):
    text = write_jsonl(tmp_path / "t.jsonl", make_texts(3))
    assert run(text, "--tokenizer", tokenizers / "a" / "tokenizer.json", "--output", tmp_path / "x.bin") == 0
    path = record_path(tmp_path / "x.bin")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": 1}))
    assert read_record(tmp_path / "x.bin").vocab_size == 290


def test_ignored_files_are_named(tmp_path, tokenizers, caplog, monkeypatch):
    text = write_jsonl(tmp_path / "t.jsonl", make_texts(30))
    folder = tmp_path / "train"
    for name in ("x.bin", "y.bin"):
        assert run(text, "--tokenizer", tokenizers / "a" / "tokenizer.json", "--output", folder / "en" / name) == 0
    (folder / ".index_cache").mkdir()
    (folder / ".index_cache" / "hidden").touch()
    assert unread_files(folder, TOKENIZED) == []
    (folder / "en" / "y.bin").unlink()
    (folder / "en" / "raw.jsonl").touch()
    (folder / "en" / "z.BIN").touch()
    caplog.set_level(logging.INFO, logger="internlm")
    monkeypatch.setattr(logging.getLogger("internlm"), "propagate", True)
    open_source(folder, seq_len=8, micro_bsz=1, packing="cut", vocab_size=290)
    names = "en/raw.jsonl, en/y.bin.meta, en/y.bin.tokenizer.json, en/z.BIN"
    line = f"ignoring files that do not belong to a .bin file: {names}"
    assert caplog.text.count(line) == 1


def test_append_to_a_broken_file_is_refused(tmp_path, tokenizers, capsys):
    text = write_jsonl(tmp_path / "t.jsonl", make_texts(3))
    options = ("--tokenizer", tokenizers / "a" / "tokenizer.json", "--output", tmp_path / "x.bin", "--append")
    (tmp_path / "x.bin").write_text('{"tokens": [1]}\n')
    assert run(text, *options) == 2
    assert "x.bin.meta is missing; if the .bin is correct" in capsys.readouterr().err
    (tmp_path / "x.bin.meta").write_text("junk")
    assert run(text, *options) == 2
    assert "x.bin.meta is not a .npy array" in capsys.readouterr().err
    (tmp_path / "x.bin.parts").mkdir()
    (tmp_path / "x.bin.parts" / "manifest.json").write_text("{")
    assert run(text, *options) == 2
    assert "manifest.json: damaged" in capsys.readouterr().err
