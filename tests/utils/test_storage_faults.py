"""Faults on the way to a store: those that pass are survived, those that last are named within the time given."""

from __future__ import annotations

import os
import threading
import time

import pytest
from helpers.fault_proxy import Fault, FaultProxy
from helpers.s3 import Bucket

from internlm.utils.errors import StorageError
from internlm.utils.storage import retry, s3_streams, storage_path

PART = 64 * 1024
PASSING = {
    "503": Fault(status=503, code="SlowDown"),
    "500": Fault(status=500),
    "429": Fault(status=429, code="TooManyRequests"),
    "silence": Fault(silence=3.0),
    "cut": Fault(cut_upload=10_000),
    "lost answer": Fault(lose_answer=True),
}


@pytest.fixture(autouse=True)
def _small_and_fast(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_streams, "WRITE_PART_BYTES", PART)
    monkeypatch.setattr(s3_streams, "READ_PART_BYTES", PART)
    monkeypatch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setenv("INTERNLM_STORAGE_RETRY_SECONDS", "60")
    monkeypatch.setenv("INTERNLM_STORAGE_TIMEOUT_SECONDS", "1")


@pytest.fixture
def is_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNLM_STORAGE_RETRY_SECONDS", "1")
    # Longer than a busy machine takes for any answer.
    monkeypatch.setenv("INTERNLM_STORAGE_TIMEOUT_SECONDS", "2")


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
@pytest.mark.parametrize("size", [PART, 5 * PART + 7], ids=["one request", "parts"])
def test_a_write_survives_faults_that_pass(bucket: Bucket, fault: Fault, size: int) -> None:
    data = os.urandom(size)
    with FaultProxy(bucket.port) as proxy:
        for method in ("POST", "PUT"):
            proxy.plan(fault, times=2, method=method)
        path = storage_path(bucket.url_through(proxy.port)) / "file"
        path.write_bytes(data)
        assert sum(planned.times for planned in proxy.planned) == (0 if size > PART else 2)
    assert bucket.client.get_object(Bucket=bucket.name, Key="file")["Body"].read() == data


def test_a_read_survives_faults_that_pass(bucket: Bucket) -> None:
    data = os.urandom(5 * PART + 7)
    (storage_path(bucket.url) / "file").write_bytes(data)
    with FaultProxy(bucket.port) as proxy:
        path = storage_path(bucket.url_through(proxy.port)) / "file"
        for fault in (
            *PASSING.values(),
            Fault(cut_download=1000),
            Fault(cut_download=PART - 1),
            Fault(cut_download=9, silence=3),
        ):
            proxy.plan(fault, method="GET")
            proxy.plan(fault, method="HEAD")
        assert path.read_bytes() == data
        assert path.parent.names() == ["file"]
        assert path.is_file() and path.parent.is_folder()


def test_what_came_before_a_cut_is_not_fetched_again(bucket: Bucket) -> None:
    data = os.urandom(PART)
    (storage_path(bucket.url) / "file").write_bytes(data)
    with FaultProxy(bucket.port) as proxy:
        proxy.plan(Fault(cut_download=PART - 1000), method="GET")
        assert (storage_path(bucket.url_through(proxy.port)) / "file").read_bytes() == data
        assert [seen.sent for seen in proxy.seen if seen.method == "GET"] == [PART - 1000, 1000]


def test_a_write_goes_on_when_the_store_comes_back(bucket: Bucket) -> None:
    data = os.urandom(10 * PART)
    with FaultProxy(bucket.port) as proxy:
        path = storage_path(bucket.url_through(proxy.port)) / "file"
        with path.open_write() as file:
            file.write(data[: 5 * PART])
            proxy.go_away()
            timer = threading.Timer(1.0, proxy.start)
            timer.start()
            file.write(data[5 * PART :])
        timer.join()
    assert bucket.client.get_object(Bucket=bucket.name, Key="file")["Body"].read() == data
    assert bucket.uploads() == []


def test_a_lost_answer_to_the_last_request_does_not_make_a_complete_object_a_failure(bucket: Bucket) -> None:
    data = os.urandom(3 * PART)
    with FaultProxy(bucket.port) as proxy:
        # Some stores have forgotten the upload by then and say so.
        proxy.plan(Fault(lose_answer=True), method="POST", text="uploadId")
        proxy.plan(Fault(status=404, code="NoSuchUpload"), method="POST", text="uploadId")
        (storage_path(bucket.url_through(proxy.port)) / "file").write_bytes(data)
    assert bucket.client.get_object(Bucket=bucket.name, Key="file")["Body"].read() == data


def test_an_upload_that_someone_aborted_is_a_failure_although_an_older_object_is_there(bucket: Bucket) -> None:
    (storage_path(bucket.url) / "file").write_bytes(b"x" * 3 * PART)
    with FaultProxy(bucket.port) as proxy:
        proxy.plan(Fault(status=404, code="NoSuchUpload"), method="POST", text="uploadId")
        with pytest.raises(StorageError, match="NoSuchUpload"):
            (storage_path(bucket.url_through(proxy.port)) / "file").write_bytes(b"y" * 3 * PART)
        proxy.plan(Fault(status=503), method="POST", text="uploadId")
        proxy.plan(Fault(status=404, code="NoSuchUpload"), method="POST", text="uploadId")
        with pytest.raises(StorageError, match="NoSuchUpload"):
            (storage_path(bucket.url_through(proxy.port)) / "file").write_bytes(b"y" * 4 * PART)


def test_a_store_that_says_nothing_is_left_after_the_time_given_and_asked_again(bucket: Bucket) -> None:
    with FaultProxy(bucket.port) as proxy:
        path = storage_path(bucket.url_through(proxy.port)) / "file"
        proxy.plan(Fault(silence=60))
        start = time.monotonic()
        path.write_text("x")
        # One second, and what a busy machine needs for the rest.
        assert time.monotonic() - start < 30
    assert bucket.keys() == ["file"]


LASTING = {
    "503": (Fault(status=503, code="SlowDown"), "answered 503 SlowDown for 1 s; try again later"),
    "silence": (Fault(silence=3.0), "could not be reached for 1 s .*check the network"),
    "cut": (Fault(cut_upload=10_000), "could not be reached for 1 s .*check the network"),
    "denied": (
        Fault(status=403, code="AccessDenied"),
        "access to bucket '.*' at http.* is denied.*let the owner grant it",
    ),
    "unknown key": (Fault(status=403, code="InvalidAccessKeyId"), "does not accept the credentials.*S3_ACCESS_KEY_ID"),
    "refused": (Fault(status=400, code="InvalidRequest"), "answered 400 InvalidRequest;"),
}


@pytest.mark.usefixtures("is_impatient")
@pytest.mark.parametrize(("fault", "message"), LASTING.values(), ids=LASTING.keys())
@pytest.mark.parametrize("size", [PART, 10 * PART], ids=["one request", "parts"])
def test_a_fault_that_lasts_is_named_in_time_and_leaves_nothing(
    bucket: Bucket, fault: Fault, message: str, size: int
) -> None:
    with FaultProxy(bucket.port) as proxy:
        path = storage_path(bucket.url_through(proxy.port)) / "file"
        proxy.plan(fault, times=float("inf"), method="PUT")
        start = time.monotonic()
        with pytest.raises(StorageError, match=message) as caught:
            path.write_bytes(b"x" * size)
        # One second of attempts, and what the last of them takes; the rest is for a busy machine.
        assert time.monotonic() - start < 10
        assert str(caught.value).startswith(f"cannot write '{path}': ")
    assert bucket.keys() == []
    assert bucket.uploads() == []


@pytest.mark.usefixtures("is_impatient")
def test_a_store_that_goes_away_for_good_is_named_and_what_it_keeps_goes_with_the_folder(bucket: Bucket) -> None:
    with FaultProxy(bucket.port) as proxy:
        path = storage_path(bucket.url_through(proxy.port)) / "run/file"
        with pytest.raises(StorageError, match="could not be reached for 1 s"), path.open_write() as file:
            file.write(b"x" * 2 * PART)
            file.flush()
            proxy.go_away()
            file.write(b"x" * 10 * PART)
    assert bucket.keys() == []
    assert bucket.uploads() == ["run/file"]
    (storage_path(bucket.url) / "run").remove()
    assert bucket.uploads() == []


@pytest.mark.usefixtures("is_impatient")
def test_a_read_that_fails_for_good_is_named(bucket: Bucket) -> None:
    (storage_path(bucket.url) / "file").write_bytes(b"x" * 10 * PART)
    with FaultProxy(bucket.port) as proxy:
        path = storage_path(bucket.url_through(proxy.port)) / "file"
        proxy.plan(Fault(cut_download=0), times=float("inf"), method="GET")
        with pytest.raises(StorageError, match=rf"cannot read '{path}': .* could not be reached for 1 s"):
            path.read_bytes()


def test_the_first_of_many_attempts_is_told(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    with FaultProxy(bucket.port) as proxy:
        path = storage_path(bucket.url_through(proxy.port)) / "file"
        proxy.plan(Fault(status=503, code="SlowDown"), times=3)
        with caplog.at_level("WARNING"):
            path.write_text("x")
    assert caplog.text.count("retrying for 60 s") == 1
    assert f"cannot write '{path}' yet" in caplog.text
