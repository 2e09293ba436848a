"""Input files: every format, compressed or not; ignored files and skipped content are named."""

import bz2
import gzip
import json
import lzma
import os

import pyarrow
import pyarrow.parquet
import pytest
from helpers.texts import documents_of, make_texts

from internlm.data.tokenize.command import main
from internlm.data.tokenize.input_files import find_inputs, open_input
from internlm.data.tokenize.json_values import iterate_json_array, iterate_json_lines
from internlm.data.tokenize.text_inputs import TextOptions, plan_shards, read_documents
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenize.train_bpe import train_bpe
from internlm.utils.errors import DataError


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(make_texts(200), 300, path)
    return path


def tokenize(tmp_path, tokenizer_path, *arguments):
    """Run the tool on arguments; the texts of its output, or its exit code."""
    output = tmp_path / "made" / "x.bin"
    code = main([*map(str, arguments), "--tokenizer", str(tokenizer_path), "--output", str(output), "--processes", "1"])
    assert code == 0 or not list((tmp_path / "made").glob("*.bin"))
    tokenizer = load_tokenizer(tokenizer_path)
    return [tokenizer.decode(ids[:-1]) for ids in documents_of(output)] if code == 0 else code


def test_every_kind_of_file_in_a_folder_is_read_and_the_rest_is_named(tmp_path, tokenizer_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    line = b'{"text": "%s"}\n'
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(line % b"a1") + gzip.compress(line % b"a2"))
    (folder / "b.jsonl.zst").write_bytes(zstd(line % b"b1") + zstd(line % b"b2"))
    (folder / "c.TXT").write_text("c1\nc2")
    (folder / "d.ndjson").write_bytes(line % b"d")
    (folder / "e.json.bz2").write_bytes(bz2.compress(b'[{"text": "e"}]'))
    (folder / "f.Txt.XZ").write_bytes(lzma.compress(b"f1\n\nf2\n"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["g", None, " "]}), folder / "g.PARQUET")
    (folder / "h.csv").write_text("lost,otherwise")
    (folder / "i.gz").write_bytes(gzip.compress(b"what is it"))
    (folder / "j.parquet.gz").write_bytes(gzip.compress(b"x"))
    found = tokenize(tmp_path, tokenizer_path, folder)
    assert found == ["a1", "a2", "b1", "b2", "c1", "c2", "d", "e", "f1", "f2", "g"]
    error = capsys.readouterr().err
    assert "ignored 3 file(s) of unknown format" in error
    assert all(name in error for name in ("h.csv", "i.gz", "j.parquet.gz"))
    assert "skipped 1 blank lines, 1 empty texts, 1 texts that are null" in error


def test_a_compressed_file_of_unknown_kind_takes_the_format_that_is_given(tmp_path, tokenizer_path):
    (tmp_path / "dump.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    assert tokenize(tmp_path, tokenizer_path, tmp_path / "dump.gz", "--format", "txt") == ["one", "two"]


def test_large_compressed_files_are_read_to_their_end(tmp_path):
    texts = [f"line {number} " + "x" * 200 for number in range(5000)]
    (tmp_path / "a.txt.zst").write_bytes(zstd("\n".join(texts).encode()))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    shards = plan_shards(find_inputs([tmp_path]).files, TextOptions(), 1000)
    assert [text for shard in shards for extent in shard for text in read_documents(extent, TextOptions())] == texts * 2


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt.gz", gzip.compress(b"text\n" * 1000)[:-12]),
        ("a.txt.gz", b"not compressed"),
        ("a.txt.gz", gzip.compress(b"text\n") + b"junk"),
        ("a.txt.bz2", bz2.compress(os.urandom(3000).hex().encode())[:-20]),
        ("a.txt.xz", lzma.compress(b"text\n" * 1000)[:-12]),
        ("a.txt.xz", b"not compressed"),
        ("a.txt.zst", zstd(os.urandom(3000).hex().encode())[:-20]),
        ("a.txt.zst", zstd(b"text\n") + b"junkjunk"),
        ("a.json.zst", b"not compressed"),
    ],
    ids=range(9),
)
def test_damaged_compression_is_named_and_nothing_is_written(tmp_path, tokenizer_path, capsys, name, data):
    (tmp_path / name).write_bytes(data)
    assert tokenize(tmp_path, tokenizer_path, tmp_path / name, "--restart") == 2
    error = capsys.readouterr().err
    assert name in error and "damaged or truncated" in error and "Traceback" not in error


def test_what_is_empty_is_named(tmp_path, tokenizer_path, capsys):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name, content in (("a.json", "[]"), ("b.jsonl", ""), ("c.txt", "\n \n"), ("d.json", "  ")):
        (folder / name).write_text(content)
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), folder / "e.parquet")
    (folder / "sub" / "f.jsonl").write_text('{"text": ""}\n{"text": null}\n\n')
    assert tokenize(tmp_path, tokenizer_path, folder) == 2
    error = capsys.readouterr().err
    assert "the input has no text, so nothing is written" in error
    assert "6 file(s) without any text" in error
    assert all(name in error for name in ("a.json", "b.jsonl", "c.txt", "d.json", "e.parquet", "f.jsonl"))
    assert "3 blank lines, 1 empty texts, 1 texts that are null" in error
    (folder / "g.txt").write_bytes(b"text\0\0\n")
    assert tokenize(tmp_path, tokenizer_path, folder, folder / "g.txt") == ["text\0\0"] * 2
    error = capsys.readouterr().err
    assert "6 file(s) without any text" in error and "2 texts with a NUL character, kept" in error
    assert "1 file(s) named more than once and read each time" in error and "g.txt" in error


def test_a_folder_without_any_readable_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(
        DataError, match=r"no file named \*\.txt, .*\*\.ndjson.*or compressed, with \.gz.*it contains a\.csv"
    ):
        find_inputs([tmp_path])


def test_folders_that_cannot_be_searched_and_links(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("x")
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("x")
    (tmp_path / "in" / "sub" / "other").symlink_to(tmp_path / "elsewhere")
    found = find_inputs([tmp_path / "in"]).files
    assert [path.name for path, _ in found] == ["a.txt", "b.txt"]
    (tmp_path / "in" / "c.txt").symlink_to(tmp_path / "none")
    with pytest.raises(DataError, match=r"c\.txt: not a regular file, or a broken link"):
        find_inputs([tmp_path / "in"])
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="read a pipe as '-'"):
        find_inputs([tmp_path / "pipe.txt"])
    with pytest.raises(DataError, match=r"in: cannot be read: Is a directory"):
        open_input(tmp_path / "in")


# --- JSON: nothing that is there is dropped. ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["a"] ["b"]', r"at character 6: '\[' after the '\]' that ends the array.* \.jsonl"),
        ('["a"]\n{"text": "b"}', r"at character 6: '{' after"),
        ('["a"] junk', "at character 6: 'j' after"),
        ('["a"]\0\0', "at character 5: .* after"),
        ("[]]", "at character 2: .* after"),
        ('["a",]', "at character 5: a value is missing between ',' and '\\]'; remove the comma"),
        ('["a",,"b"]', "at character 5: Expecting value"),
        ('[,"a"]', "at character 1: Expecting value"),
        ('["a" "b"]', "at character 5: ',' or '\\]' is missing"),
        ('["a"', "truncated: the array ends without '\\]' at character 4"),
        ('["a",', "truncated"),
        ("[", "truncated"),
        ('["a", "b', "Unterminated string"),
        ('{"text": "a"}, {"text": "b"}', "at character 13: Expecting value"),
        ('{"text": "a"', "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[nul]", "Expecting value"),
    ],
)
@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_invalid_json_is_refused(tmp_path, monkeypatch, content, message, block):
    monkeypatch.setattr("internlm.data.tokenize.json_values._BLOCK", block)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=rf"a\.json: .*{message}"):
        list(iterate_json_array(tmp_path / "a.json"))


@pytest.mark.parametrize("block", [1, 2, 5, 1 << 20])
def test_json_values_are_those_of_the_library(tmp_path, monkeypatch, block):
    monkeypatch.setattr("internlm.data.tokenize.json_values._BLOCK", block)
    values = [
        1,
        23,
        4567.25,
        -8e10,
        True,
        None,
        "two",
        "",
        'q " \\ ] [',
        {"a": [1, {"b": None}]},
        [],
        [[2]],
        "你好",
        901,
    ]
    path = tmp_path / "a.json"
    for content in (json.dumps(values), json.dumps(values, indent=1, ensure_ascii=False), "[]", " [ ] \n"):
        path.write_bytes(content.encode())
        assert list(iterate_json_array(path)) == json.loads(content)
        path.write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert list(iterate_json_array(path)) == json.loads(content)
    path.write_text('{"text": "a"}\n{"text": "b"} {"text": "c"}\n')  # records without an array
    assert [record["text"] for record in iterate_json_array(path)] == ["a", "b", "c"]
    for values in (["a", "b"], [1, 22], [{"text": "a"}, {"text": "b"}]):
        path.write_text("\n".join(map(json.dumps, values)))  # the last line has no end
        assert list(iterate_json_array(path)) == list(iterate_json_lines(path)) == values


@pytest.mark.parametrize("block", range(1, 12))
def test_numbers_may_be_cut_anywhere(tmp_path, monkeypatch, block):
    monkeypatch.setattr("internlm.data.tokenize.json_values._BLOCK", block)
    (tmp_path / "a.json").write_text("[ 12500.0,-1.5e+10, 7]")
    assert list(iterate_json_array(tmp_path / "a.json")) == [12500.0, -1.5e10, 7]


def test_lines_nested_too_deeply_are_named(tmp_path, tokenizer_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "[" * 100_000 + "\n")
    assert tokenize(tmp_path, tokenizer_path, tmp_path / "a.jsonl") == 2
    assert "a.jsonl: the line at byte 14 is not JSON" in capsys.readouterr().err
