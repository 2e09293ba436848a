"""Object stores that speak S3, against a real server on the loopback."""

from __future__ import annotations

import os

from internlm.utils.storage import s3_streams, storage_path
from helpers.s3 import Bucket

MIB = 1024**2


def test_what_is_written_is_read_back_whatever_its_size(bucket: Bucket) -> None:
    for size in (0, 1, s3_streams.WRITE_PART_BYTES, 3 * s3_streams.WRITE_PART_BYTES + 12345):
        data = os.urandom(size)
        path = storage_path(bucket.url) / "some/file"
        path.write_bytes(data)
        assert path.size() == size
        assert path.read_bytes() == data
        assert bucket.client.get_object(Bucket=bucket.name, Key="some/file")["Body"].read() == data
    assert bucket.uploads() == []
