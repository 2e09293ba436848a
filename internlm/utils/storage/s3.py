"""Buckets of stores with the S3 protocol: AWS, MinIO and Ceph, Volcengine TOS, Alibaba OSS."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from internlm.utils.storage.failures import ReplacedError
from internlm.utils.storage.retry import RetryPolicy
from internlm.utils.storage.s3_bucket import S3Bucket
from internlm.utils.storage.s3_client import Connection, Credentials, Service
from internlm.utils.storage.s3_streams import S3Sink, S3Source
from internlm.utils.storage.store import Store, StoredFile

NUM_REMOVERS = 8


@dataclass(frozen=True)
class S3Address:
    """A bucket of a service.

    Attributes:
        service: kind of service, which determines the credentials.
        bucket: name of the bucket.
        endpoint: URL of the service; None for AWS or the one in AWS_ENDPOINT_URL.
        region: region of the bucket; None for the one in the environment.
    """

    service: Service
    bucket: str
    endpoint: str | None = None
    region: str | None = None

    def open(self) -> Store:
        """The bucket, with the credentials and retry policy of the environment."""
        credentials = Credentials.from_environment(self.service)
        connection = Connection(self.service, self.endpoint, self.region, credentials, RetryPolicy.from_environment())
        return _open_store(connection, self.bucket)


@functools.lru_cache
def _open_store(connection: Connection, bucket: str) -> S3Store:
    return S3Store(connection, bucket)


os.register_at_fork(after_in_child=_open_store.cache_clear)


class S3Store(S3Bucket):
    """The files in one bucket."""

    # The latency of a request is about the transfer time of this many bytes.
    block_bytes = 4 * 1024**2

    def is_file(self, key: str) -> bool:
        return bool(key) and self.head(key) is not None

    def is_folder(self, key: str) -> bool:
        answer = self.call(self.client.list_objects_v2, f"list '{key}'", Prefix=_folder(key), MaxKeys=1)
        return bool(answer.get("Contents"))

    def names(self, key: str) -> list[str]:
        prefix = _folder(key)
        names: set[str] = set()
        for page in self._pages(prefix, Delimiter="/"):
            names.update(folder["Prefix"] for folder in page.get("CommonPrefixes", []))
            names.update(file["Key"] for file in page.get("Contents", []))
        # Some tools mark a folder with an object of the folder's name.
        return [name.removeprefix(prefix).rstrip("/") for name in names if name != prefix]

    def size(self, key: str) -> int:
        return int(self._head_of_file(key)["ContentLength"])

    def files(self, key: str) -> Iterator[StoredFile]:
        prefix = _folder(key)
        for page in self._pages(prefix):
            for file in page.get("Contents", []):
                # Some tools mark a folder with an object of the folder's name.
                if not file["Key"].endswith("/"):
                    yield StoredFile(file["Key"].removeprefix(prefix), file["Size"], file["ETag"])

    def version(self, key: str) -> str:
        return str(self._head_of_file(key)["ETag"])

    def open_read(self, key: str, url: str, version: str | None = None) -> S3Source:
        head = self._head_of_file(key)
        if version is not None and head["ETag"] != version:
            raise ReplacedError(key)
        return S3Source(self, url, key, head["ContentLength"], head["ETag"])

    def open_write(self, key: str, url: str) -> S3Sink:
        return S3Sink(self, url, key)

    def make_folder(self, key: str) -> None:
        """Does nothing: an object store has no folders."""

    def remove(self, key: str) -> None:
        """Remove an object and everything below it, including unfinished uploads."""
        keys = [key] if key else []
        keys += [file["Key"] for page in self._pages(_folder(key)) for file in page.get("Contents", [])]

        def remove_one(key: str) -> None:
            # One by one: the batch request needs a checksum that differs between stores.
            self.call(self.client.delete_object, f"remove '{key}'", Key=key)

        with ThreadPoolExecutor(min(NUM_REMOVERS, max(1, len(keys)))) as removers:
            list(removers.map(remove_one, keys))
        # Some credentials may not list uploads, and some stores cannot.
        with suppress(self.client.exceptions.ClientError):
            self._abort_uploads(key)

    def _head_of_file(self, key: str) -> dict[str, Any]:
        head = self.head(key)
        if head is None:
            raise FileNotFoundError(key)
        return head

    def _pages(self, prefix: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        more: dict[str, Any] = {}
        while True:
            page = self.call(self.client.list_objects_v2, f"list '{prefix}'", Prefix=prefix, **arguments, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _abort_uploads(self, key: str) -> None:
        answer = self.call(self.client.list_multipart_uploads, f"list uploads of '{key}'", Prefix=key)
        for upload in answer.get("Uploads", []):
            if upload["Key"] == key or upload["Key"].startswith(_folder(key)):
                self.call(
                    self.client.abort_multipart_upload,
                    f"abort an upload of '{key}'",
                    Key=upload["Key"],
                    UploadId=upload["UploadId"],
                )


def _folder(key: str) -> str:
    return f"{key}/" if key else ""
