"""Folders in an S3 server give the samples, files and rows of the same folder on the disk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data_folders import FORMATS, NAMES, documents, upload, write_file, write_folder, write_rows
from helpers.fault_proxy import FaultProxy
from helpers.s3 import Bucket

from internlm.data.batch import MicroBatch
from internlm.data.documents.folder_checks import check_train_folder
from internlm.data.documents.folders import find_train_files, find_valid_sets
from internlm.data.documents.valid_sets import folder_sets
from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.loaders.valid_loader import build_valid_loaders
from internlm.data.remote import mirror
from internlm.data.remote.fetch_ahead import FetchAhead
from internlm.data.remote.mirror import DataCache, local_folder
from internlm.data.rows.hub_datasets import locate_dataset
from internlm.data.rows.open_rows import open_rows
from internlm.data.rows.row_folders import find_row_files
from internlm.data.sources.open_source import open_source
from internlm.data.sources.replay_stream import ReplayStream
from internlm.data.sources.sample_stream import ShuffledSource
from internlm.utils.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _every_file_is_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mirror, "_SMALL_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def contents(cache: Path) -> set[str]:
    """Names of the large files that have been fetched."""
    return {path.name for path in cache.glob("*.internlm-mirror/content/*/**/*") if path.is_file()}


def arrays_of(micro_batch: MicroBatch) -> list[Any]:
    return [micro_batch.input_ids.tolist(), micro_batch.labels.tolist(), micro_batch.type_ids.tolist()]


def batches(folder: str | Path, format: str, packing: str, num_workers: int = 0) -> tuple[list[str], list[Any]]:
    source = open_source(
        folder, seq_len=32, micro_bsz=2, packing=packing, vocab_size=1000, format=FORMATS[format]  # type: ignore[arg-type]
    )  # fmt: skip
    loader = build_train_loader(ShuffledSource(source, 1), micro_num=2, num_workers=num_workers, total_steps=60)
    return source.type_names, [[arrays_of(micro) for micro in batch.micro_batches] for batch in loader]


@pytest.mark.parametrize("packing", ["cut", "best_fit", "unpacked"])
@pytest.mark.parametrize("format", FORMATS)
def test_batches_are_those_of_the_local_folder(bucket: Bucket, tmp_path: Path, format: str, packing: str) -> None:
    folder = write_folder(tmp_path / "train", format)
    url = upload(folder, bucket, "data/train")
    assert batches(url, format, packing) == batches(folder, format, packing)


@pytest.mark.parametrize("format", FORMATS)
def test_worker_processes_fetch(bucket: Bucket, tmp_path: Path, format: str) -> None:
    folder = write_folder(tmp_path / "train", format)
    url = upload(folder, bucket, "train")
    assert batches(url, format, "cut", num_workers=2) == batches(folder, format, "cut")


@pytest.mark.parametrize("format", FORMATS)
def test_valid_sets_are_those_of_the_local_folder(bucket: Bucket, tmp_path: Path, format: str) -> None:
    folder = write_folder(tmp_path / "valid", format)
    url = upload(folder, bucket, "valid")
    found = []
    for place in (folder, url):
        sets = folder_sets(local_folder(place), FORMATS[format])
        loaders = build_valid_loaders(sets, seq_len=32, micro_bsz=2, vocab_size=1000)
        found.append({n: [[arrays_of(m) for m in b.micro_batches] for b in each] for n, each in loaders.items()})
    assert found[0] == found[1] and list(found[0]) == ["cn", "en"]


@pytest.mark.parametrize(
    ("format", "fetched"), [("tokenized", 0), ("megatron", 0), ("ds", 0), ("npy", 4), ("arrays", 4)]
)
def test_opening_fetches_only_what_counts_need(
    bucket: Bucket, tmp_path: Path, format: str, fetched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is fetched ahead of need has tests of its own.
    monkeypatch.setattr(FetchAhead, "request", lambda *given: None)
    folder = write_folder(tmp_path / "train", format)
    upload(folder, bucket, "train")
    settings: dict[str, Any] = {"seq_len": 32, "micro_bsz": 2, "packing": "cut", "vocab_size": 1000}
    settings["format"] = FORMATS[format]
    with FaultProxy(bucket.port) as proxy:
        remote = f"{bucket.url_through(proxy.port)}/train"
        cache = DataCache(tmp_path / "here")
        source = open_source(local_folder(remote, cache), **settings)
        assert len(contents(tmp_path / "here")) == fetched
        source.sample(0)
        assert len(contents(tmp_path / "here")) == max(1, fetched)
        # What was counted once is not fetched again, even if the file itself has been removed.
        for path in (tmp_path / "here").glob("*/content/*/**/*.*"):
            path.unlink()
        open_source(local_folder(remote, cache), **settings)
        assert not contents(tmp_path / "here")
        for path in (tmp_path / "here").glob("*/heads/*"):
            assert path.stat().st_blocks * 512 <= 8192


def test_a_separatorless_array_needs_its_first_bytes_alone(bucket: Bucket, tmp_path: Path) -> None:
    write_file(tmp_path / "train/a", "npy", [list(range(1, 800))] * 100)
    upload(tmp_path / "train", bucket, "train")
    size = (tmp_path / "train/a.npy").stat().st_size
    with FaultProxy(bucket.port) as proxy:
        folder = local_folder(f"{bucket.url_through(proxy.port)}/train", DataCache(tmp_path / "here"))
        format = FORMATS["npy"].__class__()
        source = open_source(folder, seq_len=32, micro_bsz=2, packing="cut", vocab_size=1000, format=format)
        assert len(source) == 79_900 // 64 and not contents(tmp_path / "here")
        assert sum(seen.sent for seen in proxy.seen if "a.npy" in seen.path) == 4096 < size


def test_one_file_and_a_prefix(bucket: Bucket, tmp_path: Path) -> None:
    write_file(tmp_path / "d/corpus_text_document", "megatron", documents(1))
    write_file(tmp_path / "d/corpus_text_document_2", "megatron", documents(2))
    url = upload(tmp_path / "d", bucket, "d")
    for name in ("corpus_text_document", "corpus_text_document.bin"):
        found, types = find_train_files(local_folder(f"{url}/{name}"), FORMATS["megatron"])
        assert [file.path.name for file in found] == ["corpus_text_document.bin"]
        assert types == ["corpus_text_document"]
        assert [len(FORMATS["megatron"].open(file.path)) for file in found] == [60]


def test_names_types_and_sizes_are_found_without_a_fetch(bucket: Bucket, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "train", "tokenized")
    url = upload(folder, bucket, "some/train")
    here = local_folder(url, DataCache(tmp_path / "here"))
    for find in (find_train_files, find_valid_sets):
        local, remote = find(folder, FORMATS["tokenized"]), find(here, FORMATS["tokenized"])
        assert repr(local).replace(str(folder), "") == repr(remote).replace(str(here), "")
    for name in NAMES:
        assert (Path(here) / f"{name}.bin").stat().st_size == (folder / f"{name}.bin").stat().st_size
    assert not contents(tmp_path / "here")
    bucket_itself = find_train_files(
        local_folder(f"{bucket.url}/some", DataCache(tmp_path / "here")), FORMATS["tokenized"]
    )
    assert bucket_itself[1] == ["train"]


def test_a_new_listing_follows_the_store(bucket: Bucket, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "train", "megatron")
    url = upload(folder, bucket, "train")
    first = batches(url, "megatron", "cut")
    assert first == batches(folder, "megatron", "cut")
    # The same size with other ids, a new file and one less.
    write_file(folder / "cn/a", "megatron", [[token // 2 for token in document] for document in documents(0)])
    write_file(folder / "cn/new", "megatron", documents(9))
    for name in ("en/b.bin", "en/b.idx"):
        bucket.client.delete_object(Bucket=bucket.name, Key=f"train/{name}")
        (folder / name).unlink()
    upload(folder, bucket, "train")
    second = batches(url, "megatron", "cut")
    assert second == batches(folder, "megatron", "cut") != first


def test_rows_are_those_of_the_local_folder(bucket: Bucket, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    url = upload(tmp_path / "rows", bucket, "rows")
    folder = locate_dataset(url)
    assert [file.path.name for file in find_row_files(url).files] == ["rows.json", "rows.jsonl"]
    for name in ("rows.parquet", "rows.arrow", "rows.jsonl", "rows.json"):
        file = open_rows(folder / name)
        assert len(file) == len(rows)
        again = pickle.loads(pickle.dumps(file))
        assert [again.read(number) for number in range(len(rows))] == rows
    assert contents(tmp_path / "cache/internlm/remote") == {"rows.parquet", "rows.arrow", "rows.jsonl", "rows.json"}
    # Counted once: the rows of files that are not there any more are known.
    for path in (tmp_path / "cache").glob("internlm/remote/*/content/*/rows.*"):
        path.unlink()
    assert len(open_rows(folder / "rows.parquet")) == len(open_rows(folder / "rows.arrow")) == len(rows)
    assert not contents(tmp_path / "cache/internlm/remote")
    assert open_rows(folder / "rows.parquet").read(7) == rows[7]


def test_objects_that_no_folder_can_have_are_refused(bucket: Bucket, tmp_path: Path) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key="a/x//b.bin", Body=b"1")
    with pytest.raises(DataError, match=r"the object 'x//b\.bin' cannot be a file"):
        local_folder(f"{bucket.url}/a")
    for key in ("c/x.bin", "c/x.bin/y.bin"):
        bucket.client.put_object(Bucket=bucket.name, Key=key, Body=b"1")
    with pytest.raises(DataError, match=r"'x\.bin' cannot be a file"):
        local_folder(f"{bucket.url}/c")
    assert not list((tmp_path / "cache/internlm/remote").glob("*"))


def test_missing_things_are_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=f"{bucket.url}/trian: no file there; check the spelling"):
        local_folder(f"{bucket.url}/trian")
    with pytest.raises(DataError, match="there is no bucket 'no-such-bucket'"):
        local_folder("s3://no-such-bucket/train")
    with pytest.raises(ConfigError, match="unknown prefix"):
        local_folder("s4://bucket/train")
    assert local_folder("/a/b") == "/a/b"


def break_vocabulary(folder: Path) -> None:
    write_file(folder / "en/a", "tokenized", [[5, 2000, 3]])


def break_meta(folder: Path) -> None:
    write_file(folder / "en/a", "tokenized", [[5, 3]])
    (folder / "en/a.bin.meta").unlink()


def break_line(folder: Path) -> None:
    write_file(folder / "en/a", "tokenized", [[5, 3, 7]])
    data = (folder / "en/a.bin").read_bytes()
    (folder / "en/a.bin").write_bytes(data.replace(b"5", b"x"))


def mix_layouts(folder: Path) -> None:
    write_file(folder / "en/a", "tokenized", [[5, 3]])
    write_file(folder / "a", "tokenized", [[5, 3]])


def write_text(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}')


@pytest.mark.parametrize("break_folder", [break_vocabulary, break_meta, break_line, mix_layouts, write_text])
def test_errors_name_the_url(bucket: Bucket, tmp_path: Path, break_folder: Any) -> None:
    break_folder(tmp_path / "d")
    url = upload(tmp_path / "d", bucket, "d")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    for cache in (tmp_path / "here", tmp_path / "link"):
        with pytest.raises(DataError) as caught:
            check_train_folder(local_folder(url, DataCache(cache)), FORMATS["tokenized"], 1000)
        assert url in str(caught.value) and "mirror" not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_a_loader_name_the_url(bucket: Bucket, tmp_path: Path, num_workers: int) -> None:
    write_file(tmp_path / "d/a", "tokenized", [[5, 2000, 3] * 20] * 20)
    url = upload(tmp_path / "d", bucket, "d")
    with pytest.raises(DataError, match=rf"{url}/a\.bin: document .* outside the vocabulary") as caught:
        batches(url, "tokenized", "cut", num_workers)
    assert "mirror" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b'{"text": "a"}\n{"txet": "b"}'), ("a.jsonl", b"{"), ("a.jsonl.gz", b"no gzip"), ("a.parquet", b"x")],
)
def test_errors_of_rows_name_the_url(bucket: Bucket, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    bucket.client.put_object(Bucket=bucket.name, Key=f"d/{name}", Body=content)
    file = find_row_files(f"{bucket.url}/d").files[0].path
    with pytest.raises(DataError, match=rf"^{bucket.url}/d/{name}: ") as caught:
        rows = open_rows(file, ["text"])
        [rows.read(row) for row in range(len(rows))]
    assert "mirror" not in str(caught.value)


def test_recorded_batches_are_fetched(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for kind in ("tokens", "labels"):
        torch.save(torch.arange(8).reshape(2, 4), tmp_path / f"d/{kind}_step1_dp0.pt")
        torch.save(torch.zeros(2, 4), tmp_path / f"d/{kind}_step2_dp0.pt")
    url = upload(tmp_path / "d", bucket, "d")
    options: dict[str, Any] = {"micro_bsz": 2, "rows_per_step": 2, "packing": "unpacked", "vocab_size": 9}
    stream = ReplayStream(local_folder(url), seq_len=4, **options)
    assert stream.sample(0).input_ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert "2 steps of 2 rows, of which 1 were checked" in stream.check()
    with pytest.raises(DataError, match=f"^{url}/tokens_step2_dp0.pt: torch.float32"):
        stream.sample(1)


def test_a_dry_run_checks_one_file_of_a_train_folder(bucket: Bucket, tmp_path: Path) -> None:
    url = upload(write_folder(tmp_path / "train", "tokenized"), bucket, "train")
    check = check_train_folder(local_folder(url, DataCache(tmp_path / "here")), FORMATS["tokenized"], 1000)
    assert len(contents(tmp_path / "here")) == 1
    assert "of which" in str(check)
    with pytest.raises(DataError, match="outside the vocabulary"):
        check_train_folder(local_folder(url, DataCache(tmp_path / "here")), FORMATS["tokenized"], 10)


def test_memory_is_a_store_too(tmp_path: Path) -> None:
    from internlm.utils.storage import storage_path

    folder = write_folder(tmp_path / "train", "tokenized")
    for path in folder.rglob("*.*"):
        (storage_path("memory://mirrored") / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())
    assert batches("memory://mirrored", "tokenized", "cut")[1] == batches(folder, "tokenized", "cut")[1]
