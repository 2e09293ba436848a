"""Rows of each format, against pyarrow and `datasets`; damaged files; open files and pickling."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import logging
import multiprocessing
import pickle
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from internlm.data.rows import row_offsets
from internlm.data.rows.arrow_rows import ArrowRows
from internlm.data.rows.open_rows import open_row_files, open_rows
from internlm.data.rows.parquet_rows import ParquetRows
from internlm.data.rows.process_cache import MAX_OPEN_FILES, OPEN_FILES, ProcessCache
from internlm.data.rows.row_file import read_text
from internlm.data.rows.text_rows import JsonRows, TextRows
from internlm.utils.errors import DataError

ROWS = [
    {
        "text": f"story {number} \u00e9\u4e2d\U0001f600" + " x" * (number % 7),
        "id": number,
        "tags": ["a"] * (number % 3),
        "messages": [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "answer"}],
    }
    for number in range(1, 251)
]


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))


def write(folder: Path, name: str, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=row["id"] % 2 == 0) + "\n" for row in rows).encode()
    table = pyarrow.Table.from_pylist(list(rows))
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=40)
    elif name.endswith("stream.arrow"):
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=30)
    elif name.endswith(".arrow"):
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=30)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".bz2"):
        path.write_bytes(bz2.compress(lines))
    elif name.endswith(".zst"):
        path.write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    elif name.endswith(".json"):
        path.write_text(json.dumps(list(rows), indent=1))
    else:
        path.write_bytes(lines)
    return path


NAMES = ["a.parquet", "a.stream.arrow", "a.arrow", "a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.bz2", "a.json"]


def all_rows(file: Any) -> list[dict[str, Any]]:
    return [file.read(row) for row in range(len(file))]


def load(tmp_path: Path, kind: str, path: Path | list[Path], **options: Any) -> list[dict[str, Any]]:
    files = str(path) if isinstance(path, Path) else [str(each) for each in path]
    loaded = datasets.load_dataset(
        kind, data_files=files, split="train", cache_dir=str(tmp_path / "hf_cache"), **options
    )
    return list(loaded)


@pytest.mark.parametrize("name", [*NAMES, "a.jsonl.zst"])
def test_rows_in_any_order(tmp_path: Path, name: str) -> None:
    file = open_rows(write(tmp_path, name))
    assert len(file) == len(ROWS)
    order = list(range(len(ROWS)))
    random.Random(1).shuffle(order)
    assert [file.read(row) for row in order] == [ROWS[row] for row in order]
    for row in (-1, len(ROWS)):
        with pytest.raises(IndexError, match="no row"):
            file.read(row)


@pytest.mark.parametrize("name", NAMES)
def test_same_rows_as_datasets(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    kind = {"parquet": "parquet", "arrow": "arrow"}.get(name.rsplit(".", 1)[-1], "json")
    assert all_rows(open_rows(path)) == load(tmp_path, kind, path)


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_chosen(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    assert open_rows(path, ["id"]).read(41) == {"id": 42}
    with pytest.raises(DataError, match=r"row 41 has no column 'txt'; its columns are \[.*Did you mean 'text'"):
        open_rows(path, ["txt"]).read(41)
    with pytest.raises(DataError, match="row 3 has no column 'body'"):
        read_text(open_rows(path), 3, "body")


def test_conversations_without_their_key_are_recognized(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "id": 1}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chats.parquet")
    for name in ("chats.jsonl", "chats.parquet"):
        with pytest.raises(DataError, match=r"row 0 has no column 'text'; .*: set data.conversations = {}"):
            read_text(open_rows(tmp_path / name, ["text"]), 0, "text")


def test_values_that_are_not_text(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "id": 1}, {"text": None, "id": 2}]
    for name in NAMES:
        file = open_rows(write(tmp_path, name, rows))
        assert read_text(file, 0, "text") == "a"
        with pytest.raises(DataError, match=rf"{name}: row 1: 'text' is null"):
            read_text(file, 1, "text")
        with pytest.raises(DataError, match=rf"{name}: row 0: 'id' is int, not text"):
            read_text(file, 0, "id")
    (tmp_path / "s.jsonl").write_text('{"text": "a\\ud800"}\n"only a string"\n')
    file = open_rows(tmp_path / "s.jsonl")
    with pytest.raises(DataError, match="row 0: 'text' has a lone surrogate"):
        read_text(file, 0, "text")
    assert read_text(file, 1, "text") == "only a string"


def test_invalid_utf8(tmp_path: Path) -> None:
    bad = pyarrow.array([b"fine", b"\xff\xfe"]).view(pyarrow.string())
    table = pyarrow.table({"text": bad})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        file = open_rows(tmp_path / name)
        assert read_text(file, 0, "text") == "fine"
        with pytest.raises(DataError, match=rf"{name}: row 1: 'text' is not UTF-8"):
            read_text(file, 1, "text")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a.jsonl: byte 27 is not UTF-8.*\(row 1\)"):
        open_rows(tmp_path / "a.jsonl").read(1)
    (tmp_path / "a.txt").write_bytes(b"fine\n\xe4h\n")
    with pytest.raises(DataError, match=r"a.txt: byte 5 is not UTF-8.*latin1.*\(row 1\)"):
        open_rows(tmp_path / "a.txt").read(1)


def test_blank_lines_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "0"}\r\n\r\n  \n{"text": "1"}  \n\n\n {"text": "2"}')
    assert all_rows(open_rows(path)) == [{"text": "0"}, {"text": "1"}, {"text": "2"}]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone \r\n\n   \n  two\nthree")
    assert [row["text"] for row in all_rows(open_rows(path))] == ["one ", "  two", "three"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_index_is_the_same_for_any_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    content = "\n\nfirst line\nsecond\n \t\n\nalone\n\n\n  indented\nlast"
    (tmp_path / "a.txt").write_text(content)
    monkeypatch.setattr("internlm.data.rows.row_offsets._BLOCK", block)
    lines = [row["text"] for row in all_rows(TextRows(tmp_path / "a.txt"))]
    assert lines == [line for line in content.split("\n") if line.strip()]
    paragraphs = [row["text"] for row in all_rows(TextRows(tmp_path / "a.txt", "paragraph"))]
    assert paragraphs == ["first line\nsecond", "alone", "  indented\nlast"]


def test_text_units_against_datasets(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One line.\nAnother \u00e9.\n\nA second paragraph\nof two lines.\n\nThe third.\n")
    lines = load(tmp_path, "text", path)
    assert all_rows(open_rows(path)) == [row for row in lines if row["text"]]
    paragraphs = [row["text"].rstrip("\n") for row in load(tmp_path, "text", path, sample_by="paragraph")]
    assert [row["text"] for row in all_rows(open_rows(path, text_unit="paragraph"))] == paragraphs
    assert all_rows(open_rows(path, text_unit="file")) == load(tmp_path, "text", path, sample_by="document")


def test_the_default_unit_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\n")
    with caplog.at_level(logging.INFO, "internlm"):
        open_row_files([path, path])
        assert "each line is a document" in caplog.text
        caplog.clear()
        open_row_files([path], text_unit="line")
        assert not caplog.text


def test_a_copy_is_made_once_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "a.jsonl.gz")
    with caplog.at_level(logging.INFO, "internlm"):
        assert len(open_rows(path)) == len(open_rows(path)) == len(ROWS)
    (record,) = [record for record in caplog.records if "decompressed once" in record.message]
    assert str(tmp_path / "user_cache") in record.message and f"{path.stat().st_size:,}" in record.message
    (copy,) = (tmp_path / "user_cache/internlm/text_copies").glob("*.txt")
    assert f"{copy.stat().st_size:,} bytes" in record.message
    assert {path.suffix for path in copy.parent.iterdir() if path.is_file()} == {".txt"}


def _length_in_worker(path: Path, started: Any, results: Any) -> None:
    started.wait()
    results.put((len(open_rows(path)), open_rows(path).read(17)))


def test_processes_share_one_copy_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl.gz")
    made = tmp_path / "made"
    original = row_offsets._write

    def count(target: Path, *arguments: Any) -> None:
        with open(made, "a") as file:
            file.write("x")
        original(target, *arguments)

    monkeypatch.setattr(row_offsets, "_write", count)
    context = multiprocessing.get_context("fork")
    started, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_length_in_worker, args=(path, started, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [(len(ROWS), ROWS[17])] * 4
    for worker in workers:
        worker.join()
    assert made.read_text() == "x"
    assert len(list((tmp_path / "user_cache/internlm/text_copies").glob("*.txt"))) == 1


def test_threads_share_open_files(tmp_path: Path) -> None:
    for name in NAMES:
        file = open_rows(write(tmp_path, name))
        order = list(range(len(ROWS))) * 3
        random.Random(0).shuffle(order)
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(file.read, order)) == [ROWS[row] for row in order]


def test_columns_with_dots(tmp_path: Path) -> None:
    table = pyarrow.table({"a": [1], "a.b": ["dotted"], "c": [{"b": 1}]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for columns in (["a"], ["a.b"], ["c"], ["a", "c"]):
        assert open_rows(tmp_path / "a.parquet", columns).read(0) == table.select(columns).to_pylist()[0]


def test_full_disks_name_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl.gz")

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", fail)
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be written .* bytes free: No space left.*XDG_CACHE_HOME"):
        len(open_rows(path))
    assert not list((tmp_path / "user_cache/internlm/text_copies").iterdir())


def test_empty_files(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow", "a.stream.arrow"):
        table_rows = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
        path = tmp_path / name
        if name == "a.parquet":
            pyarrow.parquet.write_table(table_rows, path)
        else:
            new = pyarrow.ipc.new_stream if "stream" in name else pyarrow.ipc.new_file
            new(path, table_rows.schema).close()
        assert len(open_rows(path)) == 0
    for name, content in {"a.jsonl": b"", "b.jsonl": b"\n \n", "a.json": b"[]", "b.json": b"", "a.txt": b""}.items():
        (tmp_path / name).write_bytes(content)
        assert len(open_rows(tmp_path / name)) == 0
    for name in ("z.parquet", "z.arrow"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=f"{name}: not a readable"):
            len(open_rows(tmp_path / name))


def test_damaged_files(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow", "a.stream.arrow", "a.jsonl.gz", "a.jsonl.zst", "a.json"):
        path = write(tmp_path, name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=name):
            len(open_rows(path))
    path = write(tmp_path, "b.parquet")
    content = bytearray(path.read_bytes())
    first = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content[first.data_page_offset : first.data_page_offset + first.total_compressed_size] = b"\xff" * (
        first.total_compressed_size
    )
    path.write_bytes(content)
    file = open_rows(path, ["text"])
    assert file.read(39)["text"] == ROWS[39]["text"]
    with pytest.raises(DataError, match=r"b\.parquet: row 40: row group 1 is damaged"):
        file.read(40)
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": "b"\n[1]\n')
    with pytest.raises(DataError, match=r"c.jsonl: row 1 \(byte 14\) is not JSON"):
        open_rows(tmp_path / "c.jsonl").read(1)
    with pytest.raises(DataError, match="row 2 is list, not an object"):
        open_rows(tmp_path / "c.jsonl").read(2)


def test_missing_files_and_pointers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        open_rows(tmp_path / "none.parquet")
    with pytest.raises(DataError, match=r"expected \*\.parquet"):
        open_rows(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match=r"pointer of Git LFS.*git lfs pull"):
        open_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_changes_is_refused(tmp_path: Path, name: str) -> None:
    file = open_rows(write(tmp_path, name))
    write(tmp_path, name, ROWS[:50])
    for use in (lambda: len(file), lambda: file.read(0)):
        with pytest.raises(DataError, match="changed since the run opened it"):
            use()


def test_a_damaged_index_is_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, "a.jsonl")
    assert all_rows(JsonRows(path)) == ROWS
    (index,) = (tmp_path / ".index_cache").iterdir()
    content = bytearray(index.read_bytes())
    content[80] ^= 5
    index.write_bytes(content)
    assert all_rows(JsonRows(path)) == ROWS
    assert caplog.text.count("checksum") == 1
    caplog.clear()
    assert all_rows(JsonRows(path)) == ROWS
    assert not caplog.text


def test_block_starts_are_row_groups(tmp_path: Path) -> None:
    path = write(tmp_path, "a.parquet")
    assert ParquetRows(path).block_starts.tolist() == [0, 40, 80, 120, 160, 200, 240]
    assert ArrowRows(write(tmp_path, "a.arrow")).block_starts is None


def _rows_of_worker(file: Any, order: list[int], results: Any) -> None:
    results.put([file.read(row) for row in order])


@pytest.mark.parametrize(("name", "method"), [*((name, "fork") for name in NAMES), ("a.jsonl", "spawn")])
def test_files_are_sent_to_processes(tmp_path: Path, name: str, method: str) -> None:
    file = open_rows(write(tmp_path, name))
    assert pickle.loads(pickle.dumps(file)).read(5) == ROWS[5]
    assert file.read(7) == ROWS[7]
    assert len(pickle.dumps(file)) < 2000
    context = multiprocessing.get_context(method)
    results = context.Queue()
    worker = context.Process(target=_rows_of_worker, args=(file, [100, 3, 249], results))
    worker.start()
    assert results.get(timeout=60) == [ROWS[100], ROWS[3], ROWS[249]]
    worker.join()


def test_at_most_128_files_are_open(tmp_path: Path) -> None:
    files = [open_rows(write(tmp_path, f"{number}.jsonl", ROWS[:2])) for number in range(MAX_OPEN_FILES + 40)]
    for file in files * 2:
        assert file.read(1) == ROWS[1]
    opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert len(OPEN_FILES) == MAX_OPEN_FILES
    assert 0 < len([path for path in opened if path.is_relative_to(tmp_path)]) <= MAX_OPEN_FILES


def test_process_cache_keeps_the_latest() -> None:
    cache: ProcessCache[str] = ProcessCache(10, len)
    loads: list[str] = []

    def get(value: str) -> str:
        return cache.get(value, lambda: loads.append(value) or value)  # type: ignore[func-returns-value]

    for value in ("aaaa", "bbbb", "aaaa", "cccc", "aaaa", "bbbb", "long value of 25 characters"):
        assert get(value) == value
    assert loads == ["aaaa", "bbbb", "cccc", "bbbb", "long value of 25 characters"]
    assert len(cache) == 1
