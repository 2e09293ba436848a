"""A real S3 server (moto) on the loopback. The fixtures are known to all tests, by tests/conftest.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest

from helpers.processes import free_port

ACCESS_KEY = "test-key"
SECRET = "test-secret"
_numbers = count()


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own, and a client that goes to the server directly."""

    name: str
    port: int
    client: Any

    @property
    def url(self) -> str:
        """As a user with AWS_ENDPOINT_URL writes it."""
        return f"s3://{self.name}"

    def url_through(self, port: int) -> str:
        """The same bucket through a proxy on `port`."""
        return f"boto3:s3://{self.name}.127.0.0.1:{port}"

    def keys(self) -> list[str]:
        """Names of all objects."""
        return [item["Key"] for item in self.client.list_objects_v2(Bucket=self.name).get("Contents", [])]

    def uploads(self) -> list[str]:
        """Keys of the uploads that were begun and neither completed nor aborted."""
        return [item["Key"] for item in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])]


@pytest.fixture(scope="session")
def s3_server() -> Iterator[int]:
    """The port of an S3 server for all tests of this session."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        # Small parts and short pages, so that few bytes and objects make many of them.
        env={**os.environ, "S3_UPLOAD_PART_MIN_SIZE": "1024", "MOTO_S3_DEFAULT_MAX_KEYS": "10"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, "the S3 server ended"
                assert time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(s3_server: int, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket; the environment leads to it, and no other credentials are found."""
    import boto3

    for name in list(os.environ):
        if name.startswith(("AWS_", "S3_")) or name in ("ACCESS_KEY", "SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    endpoint = f"http://127.0.0.1:{s3_server}"
    for name, value in {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        # Fast failures; the tests of faults that pass set their own.
        "INTERNLM_STORAGE_RETRY_SECONDS": "10",
        "INTERNLM_STORAGE_TIMEOUT_SECONDS": "5",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    name = f"bucket-{os.getpid()}-{next(_numbers)}"
    client.create_bucket(Bucket=name)
    return Bucket(name, s3_server, client)
