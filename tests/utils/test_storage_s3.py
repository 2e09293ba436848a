"""Stores that speak S3, against a real server on the loopback."""

from __future__ import annotations

import multiprocessing
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.fault_proxy import FaultProxy
from helpers.forked import run_forked
from helpers.processes import free_port
from helpers.s3 import ACCESS_KEY, SECRET, Bucket

from internlm.utils.errors import MissingFileError, ReplacedFileError, StorageError
from internlm.utils.storage import StoragePath, s3_streams, storage_path

PART = 64 * 1024


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_streams, "WRITE_PART_BYTES", PART)
    monkeypatch.setattr(s3_streams, "READ_PART_BYTES", PART)


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 7 * PART + 12345])
def test_what_is_written_is_read_back_whatever_its_size(bucket: Bucket, size: int) -> None:
    data = os.urandom(size)
    path = storage_path(bucket.url) / "some/file"
    path.write_bytes(data)
    assert path.size() == size
    assert path.read_bytes() == data
    assert bucket.client.get_object(Bucket=bucket.name, Key="some/file")["Body"].read() == data
    assert bucket.uploads() == []


def test_parts_grow_so_that_ten_thousand_hold_a_huge_object(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_streams, "PARTS_OF_A_SIZE", 2)
    data = os.urandom(2 * PART + 2 * 2 * PART + 1)
    path = storage_path(bucket.url) / "file"
    path.write_bytes(data)
    tag = bucket.client.head_object(Bucket=bucket.name, Key="file")["ETag"]
    assert tag.endswith('-5"')
    assert path.read_bytes() == data


def test_small_writes_are_collected_into_parts(bucket: Bucket) -> None:
    with FaultProxy(bucket.port) as proxy:
        with (storage_path(bucket.url_through(proxy.port)) / "file").open_write() as file:
            for number in range(3 * PART // 8):
                file.write(number.to_bytes(8, "little"))
        assert [seen.method for seen in proxy.seen] == ["POST", "PUT", "PUT", "PUT", "POST"]


def test_files_and_folders_are_told_apart(bucket: Bucket) -> None:
    root = storage_path(bucket.url)
    (root / "runs/1/mark").write_text("one")
    (root / "runs/1.old").write_text("a file beside the folder")
    assert (root / "runs").is_folder() and not (root / "runs").is_file()
    assert (root / "runs/1/mark").is_file() and not (root / "runs/1/mark").is_folder()
    assert not (root / "run").exists() and not (root / "runs/1/mar").exists()
    assert (root / "runs/1").names() == ["mark"]
    assert (root / "runs").names() == ["1", "1.old"]
    assert root.names() == ["runs"]
    assert (root / "absent").names() == []
    assert root.is_folder() and not root.is_file()


def test_an_empty_bucket_is_listed(bucket: Bucket) -> None:
    assert storage_path(bucket.url).names() == []


def test_a_folder_marked_by_other_tools_has_no_nameless_child(bucket: Bucket) -> None:
    bucket.client.put_object(Bucket=bucket.name, Key="folder/", Body=b"")
    (storage_path(bucket.url) / "folder/file").write_text("")
    assert (storage_path(bucket.url) / "folder").names() == ["file"]


def test_a_folder_of_more_than_a_page_is_listed_and_removed_whole(bucket: Bucket) -> None:
    folder = storage_path(bucket.url) / "many"
    for number in range(23):
        (folder / f"{number:02d}").write_bytes(b"")
    (storage_path(bucket.url) / "many-more").write_bytes(b"")
    assert folder.names() == [f"{number:02d}" for number in range(23)]
    folder.remove()
    assert bucket.keys() == ["many-more"]
    folder.remove()


def test_an_exception_leaves_the_older_object_as_it_was(bucket: Bucket) -> None:
    path = storage_path(bucket.url) / "file"
    path.write_text("older")
    for size in (10, 3 * PART):
        with pytest.raises(ZeroDivisionError), path.open_write() as file:
            file.write(b"x" * size)
            raise ZeroDivisionError
        assert path.read_text() == "older"
    assert bucket.uploads() == []


def test_a_file_that_nobody_closed_is_not_completed(bucket: Bucket) -> None:
    file = (storage_path(bucket.url) / "file").open_write()
    file.write(b"x" * 3 * PART)
    assert bucket.keys() == []
    del file
    assert bucket.keys() == []
    assert bucket.uploads() == []


def test_nothing_is_seen_before_the_file_is_closed(bucket: Bucket) -> None:
    path = storage_path(bucket.url) / "file"
    with path.open_write() as file:
        file.write(b"x" * 3 * PART)
        assert not path.exists()
    assert path.exists()


def test_removing_a_folder_aborts_uploads_that_a_killed_process_left(bucket: Bucket) -> None:
    for key in ("run/1/file", "run/10/file", "run/1"):
        bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    (storage_path(bucket.url) / "run/1").remove()
    assert bucket.uploads() == ["run/10/file"]


def test_a_read_fetches_little_more_than_is_asked_for(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm.utils.storage.s3.S3Store.block_bytes", 4096)
    data = os.urandom(20 * PART)
    (storage_path(bucket.url) / "file").write_bytes(data)
    with FaultProxy(bucket.port) as proxy:
        with (storage_path(bucket.url_through(proxy.port)) / "file").open_read() as file:
            file.seek(-8, os.SEEK_END)
            assert file.read() == data[-8:]
            file.seek(5 * PART + 3)
            assert file.read(100) == data[5 * PART + 3 :][:100]
            assert file.tell() == 5 * PART + 103
            assert file.read(3 * PART) == data[5 * PART + 103 :][: 3 * PART]
        assert sum(seen.sent for seen in proxy.seen) < 3 * PART + 5 * 4096


def test_an_object_replaced_while_it_is_read_is_an_error_not_a_mixture(bucket: Bucket) -> None:
    path = storage_path(bucket.url) / "file"
    path.write_bytes(b"a" * 100)
    with path.open_read() as file:
        path.write_bytes(b"b" * 100)
        with pytest.raises(StorageError, match="was replaced while it was read"):
            file.read()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_path_used_here_is_used_in_another_process(bucket: Bucket, method: str) -> None:
    path = storage_path(bucket.url) / "file"
    path.write_text("of the parent")
    process = multiprocessing.get_context(method).Process(target=_answer, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (path.parent / "answer").read_text() == "OF THE PARENT" * PART


def _answer(path: StoragePath) -> None:
    (path.parent / "answer").write_text(path.read_text().upper() * PART)


def test_a_forked_process_does_not_use_the_connections_of_its_parent(bucket: Bucket, tmp_path: Path) -> None:
    path = storage_path(bucket.url) / "file"
    path.write_text("x")
    store: Any = path._store

    def use() -> None:
        own: Any = path._store
        assert own is not store and own.client is not store.client
        assert path.read_text() == "x"

    run_forked(tmp_path, use)
    assert path._store is store


def test_a_missing_file_and_a_missing_bucket_are_named(bucket: Bucket) -> None:
    with pytest.raises(MissingFileError, match=rf"cannot read '{bucket.url}/absent': it does not exist"):
        (storage_path(bucket.url) / "absent").read_bytes()
    for use in (lambda path: path.read_bytes(), lambda path: path.exists(), lambda path: path.write_text("x")):
        with pytest.raises(StorageError, match=r"there is no bucket 'no-such-bucket' at http://127.*create it"):
            use(storage_path("s3://no-such-bucket/file"))
    with pytest.raises(StorageError, match="there is no bucket 'no-such-bucket'"):
        storage_path("s3://no-such-bucket").names()


def test_a_name_that_no_bucket_can_have_is_named(bucket: Bucket) -> None:
    with pytest.raises(StorageError, match="'a_b!' cannot be a bucket's name"):
        storage_path("s3://a_b!/file").exists()


def test_an_endpoint_where_nobody_listens_is_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNLM_STORAGE_RETRY_SECONDS", "0.5")
    port = free_port()
    with pytest.raises(
        StorageError, match=rf"http://127.0.0.1:{port} could not be reached for 0.5 s.*check the network"
    ):
        storage_path(f"boto3:s3://bucket.127.0.0.1:{port}/file").read_bytes()


def test_a_web_server_that_is_no_store_is_named(bucket: Bucket) -> None:
    class WebServer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), WebServer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with pytest.raises(StorageError, match="does not speak the S3 protocol; check the endpoint"):
            storage_path(f"boto3:s3://bucket.127.0.0.1:{server.server_address[1]}/folder").names()
    finally:
        server.shutdown()
        server.server_close()


def test_internevos_variables_are_used_and_generic_ones_win(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The server takes any key; who asks is in the signature that the client makes.
    def asked_by() -> str:
        client = storage_path(bucket.url)._store.client  # type: ignore[attr-defined]
        return client._request_signer._credentials.access_key

    assert asked_by() == ACCESS_KEY
    monkeypatch.setenv("S3_ACCESS_KEY_ID", "of-internevo")
    monkeypatch.setenv("S3_SECRET_ACCESS_KEY_ID", SECRET)
    assert asked_by() == "of-internevo"
    monkeypatch.setenv("ACCESS_KEY", "generic")
    monkeypatch.setenv("SECRET_ACCESS_KEY", SECRET)
    with caplog.at_level("WARNING"):
        assert asked_by() == "generic"
    assert "both ACCESS_KEY and S3_ACCESS_KEY_ID are set" in caplog.text
    assert SECRET not in caplog.text


def test_no_credentials_at_all_are_named(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    # Another endpoint, hence another client than those that found credentials.
    with FaultProxy(bucket.port) as proxy:
        path = storage_path(bucket.url_through(proxy.port)) / "file"
        with pytest.raises(
            StorageError, match=r"no credentials were found; set S3_ACCESS_KEY_ID and .*AWS_ACCESS_KEY_ID"
        ):
            path.write_text("x")


def test_files_of_a_folder_are_listed_with_sizes_and_versions(bucket: Bucket, tmp_path: Path) -> None:
    contents = {f"{number % 3}/deep/f{number:02}": os.urandom(number) for number in range(25)}
    bucket.client.put_object(Bucket=bucket.name, Key="folder/0/", Body=b"")
    bucket.client.put_object(Bucket=bucket.name, Key="folder.old/x", Body=b"another folder")
    listed = {}
    for root in (storage_path(bucket.url) / "folder", storage_path(tmp_path), storage_path("memory://listed/folder")):
        for name, data in contents.items():
            (root / name).parent.make_folder()
            (root / name).write_bytes(data)
        files = root.files()
        assert [file.name for file in files] == sorted(contents)
        assert [file.size for file in files] == [len(contents[file.name]) for file in files]
        assert [file.version for file in files] == [(root / file.name).version() for file in files]
        assert (root / "nothing").files() == []
        listed[root.url] = files
    assert len(listed) == 3


@pytest.mark.parametrize("kind", ["s3", "local", "memory"])
def test_a_version_is_read_or_nothing(bucket: Bucket, tmp_path: Path, kind: str) -> None:
    root = {"s3": bucket.url, "local": str(tmp_path), "memory": "memory://versions"}[kind]
    path = storage_path(root) / "file"
    path.write_bytes(b"first")
    version = path.version()
    with path.open_unbuffered(version) as file:
        assert file.read(10) == b"first"
    path.write_bytes(b"other")
    assert path.version() != version
    with pytest.raises(ReplacedFileError, match=r"cannot read '.*file': it was replaced by another version"):
        path.open_unbuffered(version)
    path.remove()
    with pytest.raises(MissingFileError):
        path.open_unbuffered(version)
