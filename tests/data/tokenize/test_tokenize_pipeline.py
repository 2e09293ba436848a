"""Tokenization: the ids of the libraries, for every format and number of processes, after any crash."""

import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from helpers.texts import documents_of, make_texts, write_jsonl
from tokenizers import Tokenizer

from internlm.data.tokenize import json_values, pipeline, shard_tokenizer, text_tokenizer
from internlm.data.tokenize.command import main
from internlm.data.tokenize.input_files import find_inputs
from internlm.data.tokenize.pipeline import TokenizeOptions, tokenize
from internlm.data.tokenize.text_inputs import TextOptions, plan_shards, read_documents
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenize.train_bpe import train_bpe
from internlm.data.tokenized_files.writer import TokenizedWriter, meta_path
from internlm.utils.errors import DataError

TOOL = Path(__file__).resolve().parents[3] / "tools" / "tokenizer.py"


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(make_texts(200), 300, path)
    return path


def reference(tokenizer_path, texts):
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, 1] for text in texts]


def run_tool(*arguments, **options):
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, **options)


def test_command_line_from_text_to_tokens(tmp_path):
    texts = make_texts(300)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    write_jsonl(tmp_path / "in" / "a.jsonl", texts[:100], key="body")
    (tmp_path / "in" / "b.json").write_text(json.dumps([{"body": text, "id": 1} for text in texts[100:150]]))
    (tmp_path / "in" / "c.txt").write_text("\n".join(texts[150:200]) + "\n\n  \n", encoding="utf-8")
    (tmp_path / "in" / "ignored.csv").write_text("x")
    table = pyarrow.table({"other": [1] * 100, "body": texts[200:]})
    pyarrow.parquet.write_table(table, tmp_path / "in" / "sub" / "d.parquet", row_group_size=30)
    tokenizer, output = tmp_path / "tok" / "tokenizer.json", tmp_path / "out" / "x.bin"
    arguments = (tmp_path / "in", "--text-key", "body", "--tokenizer", tokenizer, "--output", output, "--processes", 2)
    done = run_tool(*arguments, "--train", 300, text=True)
    assert done.returncode == 0, done.stderr
    expected = reference(tokenizer, texts)
    assert documents_of(output) == expected
    assert f"300 documents, {sum(map(len, expected)):,} tokens" in done.stdout
    assert not (tmp_path / "out" / "x.bin.parts").exists()
    again = run_tool(*arguments, text=True)
    assert again.returncode == 2 and f"error: {output} exists" in again.stderr and "--append" in again.stderr
    assert "Traceback" not in again.stderr


def test_standard_input_and_internevo_spelling(tmp_path, tokenizer_path):
    texts = make_texts(20)
    write_jsonl(tmp_path / "a.jsonl", texts)
    done = run_tool(
        "-", "--format", "txt", "--tokenizer", tokenizer_path, "--output", tmp_path / "x.bin",
        input="\r\n".join(texts).encode(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    other = ("--text_input_path", tmp_path / "a.jsonl", "--bin_output_path", tmp_path / "y.bin")
    assert main([*map(str, other), "--tokenizer_path", str(tokenizer_path)]) == 0
    assert documents_of(tmp_path / "x.bin") == documents_of(tmp_path / "y.bin") == reference(tokenizer_path, texts)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(pipeline, "_SHARD_BYTES", (2000, 2000))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_result_does_not_depend_on_processes_or_shards(tmp_path, tokenizer_path, small_shards, processes):
    texts = make_texts(200)
    write_jsonl(tmp_path / "a.jsonl", texts)
    options = TokenizeOptions((str(tmp_path / "a.jsonl"),), tmp_path / "x.bin", tokenizer_path, processes=processes)
    result = tokenize(options)
    expected = reference(tokenizer_path, texts)
    assert documents_of(tmp_path / "x.bin") == expected
    assert (result.documents, result.tokens) == (200, sum(map(len, expected)))
    assert result.num_bytes == (tmp_path / "a.jsonl").stat().st_size


def _tokenize_slowly(options):
    encode = text_tokenizer._JsonTokenizer.encode_batch

    def slow(self, texts):
        time.sleep(0.02)
        return encode(self, texts)

    text_tokenizer._JsonTokenizer.encode_batch = slow
    tokenize(options)


@pytest.mark.parametrize("append", [False, True])
def test_continues_after_being_killed(tmp_path, tokenizer_path, small_shards, append, monkeypatch, capfd):
    texts = make_texts(200)
    write_jsonl(tmp_path / "a.jsonl", texts)
    output = tmp_path / "x.bin"
    expected = reference(tokenizer_path, texts)
    if append:
        with TokenizedWriter(output) as writer:
            writer.write([5, 6])
        expected = [[5, 6], *expected]
    options = TokenizeOptions((str(tmp_path / "a.jsonl"),), output, tokenizer_path, append=append)
    process = multiprocessing.get_context("fork").Process(target=_tokenize_slowly, args=(options,))
    process.start()
    parts = tmp_path / "x.bin.parts"
    while len(list(parts.glob("*.done"))) < 3:
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert documents_of(output) == [[5, 6]] if append else not output.exists()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("*.bin")}
    assert len(done) >= 3
    made = []
    writer = shard_tokenizer.TokenizedWriter
    monkeypatch.setattr(shard_tokenizer, "TokenizedWriter", lambda path: made.append(path) or writer(path))
    tokenize(options)
    assert "continuing the interrupted run" in capfd.readouterr().err
    assert made and not set(made) & {path for path in done if path.with_suffix("").with_suffix(".done") in done}
    assert documents_of(output) == expected
    assert not parts.exists()


def test_a_crash_after_the_merge_adds_nothing_twice(tmp_path, tokenizer_path, small_shards, monkeypatch):
    texts = make_texts(50)
    write_jsonl(tmp_path / "a.jsonl", texts)
    options = TokenizeOptions((str(tmp_path / "a.jsonl"),), tmp_path / "x.bin", tokenizer_path, append=True)

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.shutil, "rmtree", crash)
        with pytest.raises(KeyboardInterrupt):
            tokenize(options)
    assert tokenize(options).documents == 50
    assert documents_of(tmp_path / "x.bin") == reference(tokenizer_path, texts)


def test_other_options_do_not_continue_an_interrupted_run(tmp_path, tokenizer_path, small_shards, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    options = TokenizeOptions((str(tmp_path / "a.jsonl"),), tmp_path / "x.bin", tokenizer_path)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_merge_parts", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokenize(options)
    changed = {"inputs": options.inputs, "output": options.output, "tokenizer": tokenizer_path, "add_eos": False}
    with pytest.raises(
        DataError, match=r"x\.bin\.parts has parts of an interrupted run with other bos or eos.*--restart"
    ):
        tokenize(TokenizeOptions(**changed))
    tokenize(TokenizeOptions(**changed, restart=True))
    assert all(document[-1] != 1 for document in documents_of(tmp_path / "x.bin"))


def test_a_corrected_input_starts_over_if_no_part_was_done(tmp_path, tokenizer_path):
    path = tmp_path / "a.json"
    options = TokenizeOptions((str(path),), tmp_path / "x.bin", tokenizer_path)
    path.write_text('[{"text": "one"}] [{"text": "two"}]')
    with pytest.raises(DataError, match="after the ']'"):
        tokenize(options)
    path.write_text('[{"text": "one"}, {"text": "two"}]')
    assert tokenize(options).documents == 2
    assert not (tmp_path / "x.bin.parts").exists()


def test_append(tmp_path, tokenizer_path):
    first, second = make_texts(10, seed=1), make_texts(10, seed=2)
    for texts, append in ((first, False), (second, True)):
        path = write_jsonl(tmp_path / "a.jsonl", texts)
        result = tokenize(TokenizeOptions((str(path),), tmp_path / "x.bin", tokenizer_path, append=append))
        assert result.documents == 10
    assert documents_of(tmp_path / "x.bin") == reference(tokenizer_path, first + second)


def test_valid_split_is_a_function_of_the_text(tmp_path, tokenizer_path):
    texts = list(dict.fromkeys(make_texts(400)))
    parts = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        path = write_jsonl(tmp_path / f"{name}.jsonl", order)
        train, valid = tmp_path / f"{name}.bin", tmp_path / f"{name}.valid.bin"
        tokenize(
            TokenizeOptions((str(path),), train, tokenizer_path, valid_fraction=0.25, valid_output=valid, processes=2)
        )
        parts.append((sorted(documents_of(train)), sorted(documents_of(valid))))
    assert parts[0] == parts[1]
    assert sorted(parts[0][0] + parts[0][1]) == sorted(reference(tokenizer_path, texts))
    assert 60 < len(parts[0][1]) < 140  # 100 expected, standard deviation 8.7


def test_bos_and_eos(tmp_path, tokenizer_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["the model"])
    plain = reference(tokenizer_path, ["the model"])[0][:-1]
    tokenize(TokenizeOptions((str(path),), tmp_path / "x.bin", tokenizer_path, add_eos=False))
    assert documents_of(tmp_path / "x.bin") == [plain]
    with pytest.raises(DataError, match="names no bos token"):
        tokenize(TokenizeOptions((str(path),), tmp_path / "y.bin", tokenizer_path, add_bos=True))
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())
    config = {"bos_token": {"content": "<|pad|>"}, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenize(TokenizeOptions((str(path),), tmp_path / "z.bin", folder, add_bos=True))
    assert documents_of(tmp_path / "z.bin") == [[0, *plain]]
    with pytest.raises(DataError, match="names no eos token"):
        tokenize(TokenizeOptions((str(path),), tmp_path / "y.bin", folder, add_eos=True))


def test_sentencepiece(tmp_path):
    texts = make_texts(200)
    (tmp_path / "a.txt").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "a.txt"), model_prefix=str(tmp_path / "m"), vocab_size=40, minloglevel=2
    )
    tokenize(TokenizeOptions((str(tmp_path / "a.txt"),), tmp_path / "x.bin", tmp_path / "m.model", add_bos=True))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    expected = [[1, *processor.encode(text), 2] for text in texts]
    assert documents_of(tmp_path / "x.bin") == expected
    tokenizer = load_tokenizer(tmp_path / "m.model")
    assert tokenizer.vocab_size == 40 and tokenizer.decode(processor.encode("the model")) == "the model"


def test_folder_without_tokenizer_json(tmp_path):
    from transformers import BertTokenizer

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "model"]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink(missing_ok=True)
    (tmp_path / "hf" / "vocab.txt").write_bytes((tmp_path / "vocab.txt").read_bytes())
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert tokenizer.encode_batch(["the model", "model"]) == [[5, 6], [6]]
    assert tokenizer.eos_id is None and tokenizer.vocab_size == 7


def test_trained_tokenizer_loads_everywhere(tokenizer_path):
    from transformers import AutoTokenizer

    text = make_texts(1)[0]
    theirs = AutoTokenizer.from_pretrained(tokenizer_path.parent)
    ours = load_tokenizer(tokenizer_path)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode_batch([text])[0]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, 0) == (1, 0)
    assert ours.vocab_size == len(theirs) == 300
    assert ours.decode(ours.encode_batch([text])[0]) == text


# --- Inputs: every byte range, every mistake. ---


@pytest.mark.parametrize("shard_bytes", [1, 7, 64, 10**6])
def test_every_line_is_read_once_whatever_the_shards(tmp_path, shard_bytes):
    texts = ["one", "two zwei", "", "  ", "三", "four"] * 5
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    write_jsonl(tmp_path / "b.jsonl", texts)
    shards = plan_shards(find_inputs([tmp_path]).files, TextOptions(), shard_bytes)
    found = [text for shard in shards for extent in shard for text in read_documents(extent, TextOptions())]
    assert found == [text for text in texts if text.strip()] * 2
    assert sum(extent.num_bytes for shard in shards for extent in shard) == sum(
        path.stat().st_size for path in tmp_path.iterdir()
    )


def read_all(path, **options):
    text = TextOptions(**options)
    shards = plan_shards(find_inputs([path]).files, text, 1000)
    return [text_ for shard in shards for extent in shard for text_ in read_documents(extent, text)]


def test_whole_files_and_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    assert read_all(tmp_path / "a.txt", whole_files=True) == ["one\n\ntwo\n"]
    assert read_all(tmp_path / "a.txt") == ["one", "two"]


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_json_arrays_are_read_in_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_values, "_BLOCK", block)
    texts = ["a", 'quote " and ] and [', "你好", "\n"]
    (tmp_path / "a.json").write_text(
        "\n " + json.dumps([{"text": text} for text in texts], indent=2, ensure_ascii=False)
    )
    assert read_all(tmp_path / "a.json") == texts[:3]
    (tmp_path / "a.json").write_text(json.dumps(texts))
    assert read_all(tmp_path / "a.json") == texts[:3]
    (tmp_path / "a.json").write_text('{"text": "only one"}')
    assert read_all(tmp_path / "a.json") == ["only one"]
    (tmp_path / "a.json").write_text('["a", "b"')
    with pytest.raises(DataError, match=r"a\.json: truncated"):
        read_all(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('["a", {"b": }, ' + "1, " * 100 + "2]")
    with pytest.raises(DataError, match=r"a\.json: not JSON at character 12"):
        read_all(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\nbad \xff\n", r"a\.txt: byte 9 is not UTF-8.*iconv -f latin1"),
        (
            "a.jsonl",
            gzip.compress(b'{"text": "a"}', mtime=0),
            r"a\.jsonl: compressed by gzip; rename it to end in \.gz",
        ),
        ("a.txt", "text".encode("utf-16"), r"a\.txt: byte 0 is not UTF-8.*iconv -f utf-16"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl: byte 24 is not UTF-8"),
        ("a.json", b'[{"text": "abc\xe9"}]', r"a\.json: byte 14 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', r"a\.jsonl: the line at byte 14 is not JSON"),
        ("a.jsonl", b'{"txt": "a"}\n', r"record at byte 0 has no text 'text'; its fields are \['txt'\].*mean 'txt'"),
        ("a.jsonl", b'[{"text": "a"}]\n', r"record at byte 0 is an array, not a record; .* name it \.json"),
        ("a.jsonl", b"5\n", r"record at byte 0 has no text 'text'; it is int"),
        ("a.jsonl", b'{"text": 5}\n', r"'text' is int, not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"lone surrogate \(\\ud800\) at character 0"),
        ("a.parquet", b"junk", r"a\.parquet: not a readable parquet file"),
    ],
)
def test_bad_input_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path / name)


def test_bad_input_is_named_across_processes(tmp_path, tokenizer_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\nnot json\n')
    arguments = [tmp_path / "a.jsonl", "--tokenizer", tokenizer_path, "--output", tmp_path / "x.bin", "--processes", 2]
    assert main([str(argument) for argument in arguments]) == 2
    assert "a.jsonl: the line at byte 14 is not JSON" in capsys.readouterr().err
    assert not (tmp_path / "x.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x.bin"], "no input"),
        (["in.jsonl", "--output", "x.bin"], "--tokenizer is missing"),
        (["in.jsonl", "--tokenizer", "TOK"], "--output is missing"),
        (["none.txt", "--tokenizer", "TOK", "--output", "x.bin"], "none.txt: no such file or folder"),
        (["empty", "--tokenizer", "TOK", "--output", "x.bin"], "no file named *.txt, *.json, *.jsonl, *.parquet"),
        (["odd.dat", "--tokenizer", "TOK", "--output", "x.bin"], "unknown suffix; name the format"),
        (["in.jsonl", "--tokenizer", "none.json", "--output", "x.bin"], "none.json: no such tokenizer"),
        (["in.jsonl", "--tokenizer", "in.jsonl", "--output", "x.bin"], "not a tokenizer.json"),
        (["in.jsonl", "--tokenizer", "bad.json", "--output", "x.bin"], "bad.json: the tokenizer cannot be read"),
        (["in.jsonl", "--tokenizer", "TOK", "--output", "x.txt"], "must be named *.bin"),
        (["in.jsonl", "--tokenizer", "TOK", "--output", "x.bin", "--valid-fraction", "0.1"], "must be given together"),
        (["in.jsonl", "--tokenizer", "TOK", "--output", "x.bin", "--processes", "0"], "must be at least 1"),
        (["-", "--tokenizer", "TOK", "--output", "x.bin"], "the standard input needs --format"),
        (["in.jsonl", "--tokenizer", "TOK", "--train", "300"], "exists: remove it, or drop --train"),
        (["in.jsonl", "--tokenizer", "new.json", "--train", "100"], "at least 258"),
        (["in.jsonl", "--tokenizer", "new.json", "--train", "50000"], "too little text for 50000 ids"),
    ],
)
def test_command_line_errors(tmp_path, tokenizer_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "in.jsonl", make_texts(3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.dat").write_text("x")
    (tmp_path / "bad.json").write_text("{}")
    assert main([str(tokenizer_path) if argument == "TOK" else argument for argument in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.bin"))


def test_rebuild_meta_on_the_command_line(tmp_path, capsys):
    with TokenizedWriter(tmp_path / "x.bin") as writer:
        writer.write([1, 2])
    before = np.load(meta_path(tmp_path / "x.bin"))
    meta_path(tmp_path / "x.bin").unlink()
    assert main(["--rebuild-meta", str(tmp_path / "x.bin")]) == 0
    assert (np.load(meta_path(tmp_path / "x.bin")) == before).all()
    assert "1 documents" in capsys.readouterr().out
