"""The cache of files of object stores: its bound, its processes, and every fault between store and disk."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.data_folders import upload, write_rows
from helpers.fault_proxy import Fault, FaultProxy
from helpers.full_disk import no_file_larger_than
from helpers.s3 import Bucket

from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.remote import fetching, mirror, transfer
from internlm.data.remote.fetching import fetch
from internlm.data.remote.local_file import LazyFile, local_file
from internlm.data.remote.mirror import DataCache, local_folder, read_mirror
from internlm.data.rows.open_rows import open_rows
from internlm.data.sources.document_source import DocumentSource
from internlm.data.sources.sample_stream import ShuffledSource
from internlm.utils.errors import DataError, RemoteDataError
from internlm.utils.storage import retry

SIZE = 100_000
"""Bytes of each of the files that the tests make."""


@pytest.fixture(autouse=True)
def _no_companions_by_size_and_fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_SMALL_BYTES", 0)
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.05)
    fetching._warned.clear()


def fill(bucket: Bucket, count: int, size: int = SIZE) -> dict[str, bytes]:
    """Objects of random bytes, f0, f1, ..."""
    contents = {f"f{number}": os.urandom(size) for number in range(count)}
    for name, data in contents.items():
        bucket.client.put_object(Bucket=bucket.name, Key=f"d/{name}", Body=data)
    return contents


def fetched(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*/content/*/*")}


def read(path: Path) -> bytes:
    with local_file(path) as content:
        return content.read_bytes()


def test_the_least_recently_used_file_is_removed(bucket: Bucket, tmp_path: Path) -> None:
    contents = fill(bucket, 5)
    folder = Path(local_folder(f"{bucket.url}/d", DataCache(tmp_path, 3 * SIZE)))
    for name in ("f0", "f1", "f2", "f0", "f3"):
        assert read(folder / name) == contents[name]
    assert fetched(tmp_path) == {"f0", "f2", "f3"}
    assert read(folder / "f1") == contents["f1"]
    assert fetched(tmp_path) == {"f0", "f1", "f3"}


def test_a_file_in_use_is_never_removed(bucket: Bucket, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = fill(bucket, 4)
    folder = Path(local_folder(f"{bucket.url}/d", DataCache(tmp_path, 2 * SIZE)))
    used = local_file(folder / "f0")
    for name in ("f1", "f2", "f3"):
        read(folder / name)
        assert {"f0", name} == fetched(tmp_path)
    also = local_file(folder / "f3")
    read(folder / "f1")
    assert {"f0", "f1", "f3"} == fetched(tmp_path)
    assert "100,000 bytes more than data.cache_bytes = 200,000, because all other files are in use" in caplog.text
    assert used.path.read_bytes() == contents["f0"] and also.path.read_bytes() == contents["f3"]
    used.close()
    read(folder / "f2")
    assert "f0" not in fetched(tmp_path)


def test_a_reader_opens_a_removed_file_again(bucket: Bucket, tmp_path: Path) -> None:
    contents = fill(bucket, 4)
    folder = Path(local_folder(f"{bucket.url}/d", DataCache(tmp_path, 2 * SIZE)))
    files = {name: LazyFile(folder / name, "bytes", Path.read_bytes) for name in contents}
    assert not fetched(tmp_path)
    for name in ("f0", "f1", "f2", "f3", "f0", "f2", "f1"):
        assert files[name].get() == contents[name]
        assert len(fetched(tmp_path)) <= 2


def test_the_bound_covers_all_folders_of_a_cache(bucket: Bucket, tmp_path: Path) -> None:
    fill(bucket, 2)
    bucket.client.put_object(Bucket=bucket.name, Key="e/g0", Body=b"0" * SIZE)
    for prefix, names in (("d", ("f0", "f1")), ("e", ("g0",))):
        folder = Path(local_folder(f"{bucket.url}/{prefix}", DataCache(tmp_path, 2 * SIZE)))
        for name in names:
            read(folder / name)
    assert fetched(tmp_path) == {"f1", "g0"}


def test_a_file_larger_than_the_bound_is_refused_at_the_start(bucket: Bucket, tmp_path: Path) -> None:
    fill(bucket, 1)
    with pytest.raises(DataError, match=r"d/f0: 100,000 bytes, more than data.cache_bytes = 99,999"):
        local_folder(f"{bucket.url}/d", DataCache(tmp_path, SIZE - 1))


def test_a_run_over_more_data_than_the_bound_has_the_batches_of_the_local_folder(
    bucket: Bucket, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    for name in "abcdef":
        (tmp_path / "train").mkdir(exist_ok=True)
        with MegatronWriter(tmp_path / "train" / f"{name}.bin", np.dtype(np.uint16)) as writer:
            for length in random.integers(10, 200, 100):
                writer.write(random.integers(1, 900, length))
    sizes = [path.stat().st_size for path in (tmp_path / "train").glob("*.bin")]
    url = upload(tmp_path / "train", bucket, "train")
    cache = DataCache(tmp_path / "cache", 3 * max(sizes))
    assert sum(sizes) > 1.5 * 3 * max(sizes)

    def batches(folder: str | Path, num_workers: int) -> list[Any]:
        source = DocumentSource(folder, MEGATRON, seq_len=64, micro_bsz=2, packing="cut", vocab_size=1000)
        loader = build_train_loader(ShuffledSource(source, 1), micro_num=1, num_workers=num_workers, total_steps=60)
        taken = []
        for batch in loader:
            taken.append([micro.input_ids.tolist() for micro in batch.micro_batches])
            total = 0
            for path in (tmp_path / "cache").glob("*/content/*/*"):
                with contextlib.suppress(FileNotFoundError):  # a worker has just removed it
                    total += path.stat().st_size
            # Each process may have two files in use, which are not removed.
            assert total <= max(3, 2 * num_workers) * max(sizes) < sum(sizes)
        return taken

    with FaultProxy(bucket.port) as proxy:
        folder = local_folder(f"{bucket.url_through(proxy.port)}/train", cache)
        local = batches(tmp_path / "train", 0)
        assert batches(folder, 0) == local
        gets = [seen for seen in proxy.seen if seen.method == "GET" and ".bin" in seen.path]
        assert len(gets) > len(sizes)
        assert batches(folder, 2) == local
    assert url


def test_processes_share_a_cache(bucket: Bucket, tmp_path: Path) -> None:
    contents = fill(bucket, 6)
    with FaultProxy(bucket.port) as proxy:
        folder = Path(local_folder(f"{bucket.url_through(proxy.port)}/d", DataCache(tmp_path)))
        context = multiprocessing.get_context("fork")
        results: Any = context.Queue()

        def work() -> None:
            results.put([read(folder / name) == contents[name] for name in contents])

        processes = [context.Process(target=work) for _ in range(4)]
        for process in processes:
            process.start()
        assert [results.get(timeout=60) for _ in processes] == [[True] * 6] * 4
        for process in processes:
            process.join()
        downloads = [seen for seen in proxy.seen if seen.method == "GET" and "/d/f" in seen.path]
    assert len(downloads) == 6


def test_processes_share_a_bounded_cache(bucket: Bucket, tmp_path: Path) -> None:
    contents = fill(bucket, 8)
    folder = Path(local_folder(f"{bucket.url}/d", DataCache(tmp_path, 5 * SIZE)))
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()

    def work(seed: int) -> None:
        names = np.random.default_rng(seed).choice(list(contents), 60)
        right = [read(folder / str(name)) == contents[str(name)] for name in names]
        results.put(all(right) and len(fetched(tmp_path)) <= 5)

    processes = [context.Process(target=work, args=(seed,)) for seed in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=90) for _ in processes] == [True] * 3
    for process in processes:
        process.join()


FAULTS = {
    "500": Fault(status=500),
    "503": Fault(status=503, code="SlowDown"),
    "silence": Fault(silence=2.0),
    "cut": Fault(cut_download=SIZE // 3),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_faults_that_pass_are_waited_out(
    bucket: Bucket, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("INTERNLM_STORAGE_TIMEOUT_SECONDS", "1")
    contents = fill(bucket, 1)
    with FaultProxy(bucket.port) as proxy:
        proxy.plan(fault, times=2, method="GET")
        folder = Path(local_folder(f"{bucket.url_through(proxy.port)}/d", DataCache(tmp_path)))
        proxy.plan(fault, times=2, method="GET")
        assert read(folder / "f0") == contents["f0"]
        assert sum(planned.times for planned in proxy.planned) == 0
    assert "retrying for 10 s" in caplog.text


def test_a_store_that_comes_back_is_waited_for(bucket: Bucket, tmp_path: Path) -> None:
    contents = fill(bucket, 1)
    with FaultProxy(bucket.port) as proxy:
        folder = Path(local_folder(f"{bucket.url_through(proxy.port)}/d", DataCache(tmp_path)))
        proxy.go_away()
        timer = threading.Timer(1.0, proxy.start)
        timer.start()
        assert read(folder / "f0") == contents["f0"]
        timer.join()


def test_a_store_that_stays_away_is_named(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNLM_STORAGE_RETRY_SECONDS", "1")
    fill(bucket, 1)
    with FaultProxy(bucket.port) as proxy:
        folder = Path(local_folder(f"{bucket.url_through(proxy.port)}/d", DataCache(tmp_path)))
        proxy.go_away()
        with pytest.raises(RemoteDataError, match=r"cannot read '.*/d/f0': .* could not be reached for 1 s"):
            read(folder / "f0")
    assert not fetched(tmp_path)


def test_an_interrupted_download_continues_where_it_stopped(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNLM_STORAGE_RETRY_SECONDS", "0")
    monkeypatch.setattr(transfer, "_CHUNK_BYTES", SIZE // 4)
    contents = fill(bucket, 1)
    with FaultProxy(bucket.port) as proxy:
        folder = Path(local_folder(f"{bucket.url_through(proxy.port)}/d", DataCache(tmp_path)))
        proxy.plan(Fault(status=500), method="GET", times=0)
        original = transfer.download
        monkeypatch.setattr(fetching, "download", lambda *given: original(*given, stop=SIZE // 2 + 1))
        with pytest.raises(RemoteDataError, match="50,001 bytes arrived, the store listed 100,000"):
            read(folder / "f0")
        # A process that is killed leaves what it has.
        (partial,) = tmp_path.glob("*/partial/*.*")
        partial.write_bytes(contents["f0"][: SIZE // 2 + 1])
        monkeypatch.setattr(fetching, "download", original)
        proxy.seen.clear()
        assert read(folder / "f0") == contents["f0"]
        assert sum(seen.sent for seen in proxy.seen if seen.method == "GET") == SIZE - SIZE // 2 - 1
    assert not list(tmp_path.glob("*/partial/*.*"))


def test_a_killed_download_is_never_used(bucket: Bucket, tmp_path: Path) -> None:
    contents = fill(bucket, 1)
    with FaultProxy(bucket.port) as proxy:
        folder = Path(local_folder(f"{bucket.url_through(proxy.port)}/d", DataCache(tmp_path)))
        proxy.plan(Fault(cut_download=SIZE // 2, silence=30), method="GET", text="/d/f0")
        process = multiprocessing.get_context("fork").Process(target=read, args=(folder / "f0",))
        process.start()
        while not any("/d/f0" in seen.path and seen.method == "GET" for seen in proxy.seen):
            assert process.is_alive()
        process.kill()
        process.join()
        assert not fetched(tmp_path)
        assert read(folder / "f0") == contents["f0"]


def test_a_partial_file_of_a_wrong_size_is_fetched_from_the_beginning(bucket: Bucket, tmp_path: Path) -> None:
    contents = fill(bucket, 1)
    folder = Path(local_folder(f"{bucket.url}/d", DataCache(tmp_path)))
    (mirror_folder,) = tmp_path.glob("*.internlm-mirror")
    (mirror_folder / "partial").mkdir()
    listed = read_mirror(mirror_folder)
    assert listed is not None
    partial = mirror_folder / "partial" / f"{mirror.version_hash(listed.files['f0'])}.{SIZE}"
    partial.write_bytes(bytes(SIZE + 1))
    with pytest.raises(RemoteDataError, match="100,001 bytes arrived, the store listed 100,000; start the run again"):
        read(folder / "f0")
    assert not fetched(tmp_path)
    assert read(folder / "f0") == contents["f0"]


def test_abandoned_partial_files_make_room(bucket: Bucket, tmp_path: Path) -> None:
    fill(bucket, 3)
    folder = Path(local_folder(f"{bucket.url}/d", DataCache(tmp_path, 2 * SIZE)))
    (mirror_folder,) = tmp_path.glob("*.internlm-mirror")
    (mirror_folder / "partial").mkdir()
    (mirror_folder / "partial" / f"0123.{SIZE}").write_bytes(b"x")
    read(folder / "f0")
    read(folder / "f1")
    assert fetched(tmp_path) == {"f0", "f1"} and not list(mirror_folder.glob("partial/*"))


def test_an_object_that_is_gone_is_named(bucket: Bucket, tmp_path: Path) -> None:
    fill(bucket, 1)
    folder = Path(local_folder(f"{bucket.url}/d", DataCache(tmp_path)))
    bucket.client.delete_object(Bucket=bucket.name, Key="d/f0")
    with pytest.raises(RemoteDataError, match=f"{bucket.url}/d/f0: gone since the run listed its folder. Restore it"):
        read(folder / "f0")


def test_a_replaced_object_is_named(bucket: Bucket, tmp_path: Path) -> None:
    fill(bucket, 1)
    folder = Path(local_folder(f"{bucket.url}/d", DataCache(tmp_path)))
    bucket.client.put_object(Bucket=bucket.name, Key="d/f0", Body=os.urandom(SIZE))
    with pytest.raises(RemoteDataError, match=f"{bucket.url}/d/f0: replaced since the run listed its folder"):
        read(folder / "f0")
    assert not fetched(tmp_path)


def test_an_object_replaced_during_its_download_is_named(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_CHUNK_BYTES", SIZE // 4)
    fill(bucket, 1)
    with FaultProxy(bucket.port) as proxy:
        folder = Path(local_folder(f"{bucket.url_through(proxy.port)}/d", DataCache(tmp_path)))
        proxy.plan(Fault(status=412, code="PreconditionFailed"), method="GET", text="/d/f0")
        with pytest.raises(RemoteDataError, match="it was replaced while it was read"):
            read(folder / "f0")
    assert not fetched(tmp_path)


def test_another_run_that_finds_a_new_version_does_not_change_the_files_of_this_one(
    bucket: Bucket, tmp_path: Path
) -> None:
    fill(bucket, 2)
    cache = DataCache(tmp_path)
    folder = Path(local_folder(f"{bucket.url}/d", cache))
    files = [LazyFile(folder / name, "bytes", Path.read_bytes) for name in ("f0", "f1")]
    bucket.client.put_object(Bucket=bucket.name, Key="d/f0", Body=os.urandom(SIZE))
    local_folder(f"{bucket.url}/d", cache)
    assert files[1].get()
    with pytest.raises(RemoteDataError, match="another run has found another version"):
        files[0].get()


def test_contents_of_versions_that_are_no_longer_listed_are_removed(bucket: Bucket, tmp_path: Path) -> None:
    contents = fill(bucket, 3)
    cache = DataCache(tmp_path)
    folder = Path(local_folder(f"{bucket.url}/d", cache))
    for name in contents:
        read(folder / name)
    contents["f0"] = os.urandom(SIZE)
    bucket.client.put_object(Bucket=bucket.name, Key="d/f0", Body=contents["f0"])
    bucket.client.delete_object(Bucket=bucket.name, Key="d/f1")
    local_folder(f"{bucket.url}/d", cache)
    assert fetched(tmp_path) == {"f2"}
    assert read(folder / "f0") == contents["f0"] and not (folder / "f1").exists()


def test_rows_of_a_replaced_file_are_refused(bucket: Bucket, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows")
    url = upload(tmp_path / "rows", bucket, "rows")
    file = open_rows(Path(local_folder(url, DataCache(tmp_path / "cache"))) / "rows.parquet")
    upload(tmp_path / "rows", bucket, "rows")
    assert len(file) == 200
    changed = (tmp_path / "rows" / "rows.parquet").read_bytes() + b"\0"
    bucket.client.put_object(Bucket=bucket.name, Key="rows/rows.parquet", Body=changed)
    local_folder(url, DataCache(tmp_path / "cache"))
    again = open_rows(file.path)
    assert again.inputs == file.inputs
    with pytest.raises(DataError, match="changed since the run opened it"):
        file.read(0) and file._open(file.path)  # type: ignore[attr-defined]


def test_denied_access_is_named(bucket: Bucket, tmp_path: Path) -> None:
    fill(bucket, 1)
    with FaultProxy(bucket.port) as proxy:
        url = f"{bucket.url_through(proxy.port)}/d"
        proxy.plan(Fault(status=403, code="AccessDenied"), method="GET", text="list-type")
        with pytest.raises(RemoteDataError, match=r"cannot list '.*/d': access to bucket .* is denied"):
            local_folder(url, DataCache(tmp_path))
        folder = Path(local_folder(url, DataCache(tmp_path)))
        proxy.plan(Fault(status=403, code="AccessDenied"), method="GET", text="/d/f0")
        with pytest.raises(RemoteDataError, match=r"cannot read '.*/d/f0': access to bucket .* is denied"):
            read(folder / "f0")


def test_a_full_disk_is_named_and_the_download_continues_once_there_is_space(bucket: Bucket, tmp_path: Path) -> None:
    contents = fill(bucket, 1)
    folder = Path(local_folder(f"{bucket.url}/d", DataCache(tmp_path)))
    with (
        no_file_larger_than(SIZE // 2),
        pytest.raises(RemoteDataError, match=r"d/f0: cannot be written to .* Set data.cache_folder"),
    ):
        read(folder / "f0")
    assert not fetched(tmp_path)
    assert read(folder / "f0") == contents["f0"]


def test_a_full_disk_at_the_start_is_named(bucket: Bucket, tmp_path: Path) -> None:
    fill(bucket, 1)
    bucket.client.put_object(Bucket=bucket.name, Key="d/f0.meta", Body=os.urandom(SIZE))
    with (
        no_file_larger_than(SIZE // 2),
        pytest.raises(RemoteDataError, match=r"d: cannot be written to .* Set data.cache_folder"),
    ):
        local_folder(f"{bucket.url}/d", DataCache(tmp_path))
    assert read_mirror(next(tmp_path.glob("*.internlm-mirror"))) is None
    assert Path(local_folder(f"{bucket.url}/d", DataCache(tmp_path)), "f0.meta").stat().st_size == SIZE


def test_an_unchanged_folder_is_listed_and_nothing_else(bucket: Bucket, tmp_path: Path) -> None:
    fill(bucket, 2)
    bucket.client.put_object(Bucket=bucket.name, Key="d/f0.meta", Body=b"meta")
    with FaultProxy(bucket.port) as proxy:
        url = f"{bucket.url_through(proxy.port)}/d"
        folder = Path(local_folder(url, DataCache(tmp_path)))
        assert (folder / "f0.meta").read_bytes() == b"meta"
        (listing,) = tmp_path.glob("*/listing.json")
        before = listing.stat().st_mtime_ns
        proxy.seen.clear()
        local_folder(url, DataCache(tmp_path))
        assert all("list-type" in seen.path for seen in proxy.seen) and proxy.seen
        assert listing.stat().st_mtime_ns == before
        local_folder(url, DataCache(tmp_path, 10 * SIZE))
        assert json.loads(listing.read_text())["max_bytes"] == 10 * SIZE


def test_a_fetched_file_is_not_fetched_again(bucket: Bucket, tmp_path: Path) -> None:
    fill(bucket, 1)
    with FaultProxy(bucket.port) as proxy:
        folder = Path(local_folder(f"{bucket.url_through(proxy.port)}/d", DataCache(tmp_path)))
        read(folder / "f0")
        proxy.seen.clear()
        found = read_mirror(next(tmp_path.glob("*.internlm-mirror")))
        assert found is not None
        fetch(found, "f0")
        read(folder / "f0")
        assert not proxy.seen


def test_a_process_that_waited_for_a_file_does_not_wait_for_its_readers(bucket: Bucket, tmp_path: Path) -> None:
    fill(bucket, 1)
    with FaultProxy(bucket.port) as proxy:
        proxy.plan(Fault(cut_download=SIZE // 2, silence=1.0), method="GET", text="/d/f0")
        folder = Path(local_folder(f"{bucket.url_through(proxy.port)}/d", DataCache(tmp_path)))
        first: list[Any] = []
        reader = threading.Thread(target=lambda: first.append(local_file(folder / "f0")))
        reader.start()
        while not any("/d/f0" in seen.path and seen.method == "GET" for seen in proxy.seen):
            assert reader.is_alive()
        found = read_mirror(next(tmp_path.glob("*.internlm-mirror")))
        assert found is not None
        waiting = [threading.Thread(target=fetch, args=(found, "f0"), daemon=True) for _ in range(3)]
        for each in waiting:
            each.start()
        reader.join()
        # The first reader still has the file open.
        for each in waiting:
            each.join(timeout=20)
            assert not each.is_alive()
        first[0].close()
    assert not list(tmp_path.glob("*/locks/*"))


def test_a_forked_process_does_not_keep_the_locks_of_its_parent(bucket: Bucket, tmp_path: Path) -> None:
    contents = fill(bucket, 1)
    with FaultProxy(bucket.port) as proxy:
        proxy.plan(Fault(cut_download=SIZE // 2, silence=1.0), method="GET", text="/d/f0")
        folder = Path(local_folder(f"{bucket.url_through(proxy.port)}/d", DataCache(tmp_path)))
        reader = threading.Thread(target=read, args=(folder / "f0",))
        reader.start()
        while not any("/d/f0" in seen.path and seen.method == "GET" for seen in proxy.seen):
            assert reader.is_alive()
        context = multiprocessing.get_context("fork")
        end = context.Event()
        process = context.Process(target=end.wait)
        process.start()
        reader.join()
        assert process.is_alive() and read(folder / "f0") == contents["f0"]
        end.set()
        process.join()
