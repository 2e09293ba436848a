"""Streams for reading and writing objects; large ones transfer several parts in parallel."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from internlm.utils.storage.s3_bucket import S3Bucket
from internlm.utils.storage.streams import Sink, Source

NUM_TRANSFERS = 4
READ_PART_BYTES = 8 * 1024**2
WRITE_PART_BYTES = 16 * 1024**2
# A store allows 10,000 parts. With a part size that doubles every thousand parts, any allowed object fits.
PARTS_OF_A_SIZE = 1000


class CutError(ConnectionError):
    """The response ended early."""


class S3Source(Source):
    """An object being read, in the version that it had when it was opened."""

    def __init__(self, bucket: S3Bucket, url: str, key: str, size: int, tag: str) -> None:
        super().__init__(bucket, url, size)
        self._bucket = bucket
        self._key = key
        self._tag = tag
        self._transfers: ThreadPoolExecutor | None = None

    def fetch(self, offset: int, buffer: memoryview) -> None:
        if len(buffer) <= READ_PART_BYTES:
            self._fetch_part(offset, buffer)
            return
        if self._transfers is None:
            self._transfers = ThreadPoolExecutor(NUM_TRANSFERS)
        starts = range(0, len(buffer), READ_PART_BYTES)
        parts = [
            self._transfers.submit(self._fetch_part, offset + start, buffer[start : start + READ_PART_BYTES])
            for start in starts
        ]
        try:
            for part in parts:
                part.result()
        finally:
            for part in parts:
                part.cancel()

    def close(self) -> None:
        if self._transfers is not None:
            self._transfers.shutdown(cancel_futures=True)
        super().close()

    def _fetch_part(self, offset: int, buffer: memoryview) -> None:
        filled = 0

        def fetch_rest(**arguments: Any) -> None:
            # A retry continues where the connection dropped.
            nonlocal filled
            wanted = f"bytes={offset + filled}-{offset + len(buffer) - 1}"
            answer = self._bucket.client.get_object(Key=self._key, Range=wanted, IfMatch=self._tag, **arguments)
            with answer["Body"] as body:
                while filled < len(buffer):
                    count = body.readinto(buffer[filled:])
                    if not count:
                        raise CutError(f"the last {len(buffer) - filled} bytes are missing")
                    filled += count

        self._bucket.call(fetch_rest, f"read '{self.url}'")


class S3Sink(Sink):
    """An object being written: a small one in one request, a large one in parts that are uploaded as they fill."""

    def __init__(self, bucket: S3Bucket, url: str, key: str) -> None:
        super().__init__(bucket, url)
        self._bucket = bucket
        self._key = key
        self._part = bytearray()
        self._size = 0
        self._num_parts = 0
        self._upload_id: str | None = None
        self._transfers: ThreadPoolExecutor | None = None
        self._running: deque[Future[None]] = deque()
        self._tags: dict[int, str] = {}

    def put(self, data: memoryview) -> int:
        rest = data
        while len(rest):
            if len(self._part) == self._part_bytes:
                self._send_part()
            room = self._part_bytes - len(self._part)
            self._part += rest[:room]
            rest = rest[room:]
        self._size += len(data)
        return len(data)

    def finish(self) -> None:
        if self._upload_id is None:
            self._call(self._bucket.client.put_object, Body=self._part)
            return
        self._send_part()
        while self._running:
            self._running.popleft().result()
        assert self._transfers is not None
        self._transfers.shutdown()
        self._complete()

    def discard(self) -> None:
        if self._transfers is not None:
            self._transfers.shutdown(cancel_futures=True)
        if self._upload_id is not None:
            # The error that led here is the one to report. Removing the folder also removes unfinished uploads.
            with suppress(Exception):
                self._bucket.client.abort_multipart_upload(
                    Bucket=self._bucket.bucket, Key=self._key, UploadId=self._upload_id
                )

    @property
    def _part_bytes(self) -> int:
        return WRITE_PART_BYTES << (self._num_parts // PARTS_OF_A_SIZE)

    def _send_part(self) -> None:
        if self._upload_id is None:
            self._upload_id = self._call(self._bucket.client.create_multipart_upload)["UploadId"]
            self._transfers = ThreadPoolExecutor(NUM_TRANSFERS)
        while len(self._running) >= NUM_TRANSFERS:
            self._running.popleft().result()
        self._num_parts += 1
        assert self._transfers is not None
        self._running.append(self._transfers.submit(self._upload_part, self._num_parts, self._part))
        self._part = bytearray()

    def _upload_part(self, number: int, data: bytearray) -> None:
        answer = self._call(self._bucket.client.upload_part, UploadId=self._upload_id, PartNumber=number, Body=data)
        self._tags[number] = answer["ETag"]

    def _complete(self) -> None:
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(self._tags.items())]
        num_attempts = 0

        def complete(**arguments: Any) -> None:
            nonlocal num_attempts
            num_attempts += 1
            self._bucket.client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **arguments)

        try:
            self._call(complete, UploadId=self._upload_id)
        except self._bucket.client.exceptions.NoSuchUpload:
            # An earlier attempt may have succeeded although its response was lost.
            if num_attempts == 1 or not self._exists(len(parts)):
                raise

    def _exists(self, num_parts: int) -> bool:
        head = self._bucket.head(self._key)
        return head is not None and head["ContentLength"] == self._size and head["ETag"].endswith(f'-{num_parts}"')

    def _call(self, operation: Any, **arguments: Any) -> Any:
        return self._bucket.call(
            operation, f"write '{self.url}'", is_wanted=lambda: not self.is_aborted, Key=self._key, **arguments
        )
