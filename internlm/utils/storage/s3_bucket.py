"""Requests to one bucket, with retries, and explanations of their errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from internlm.utils.storage.failures import Explanation
from internlm.utils.storage.s3_client import Connection, connect

Result = TypeVar("Result")


class S3Bucket:
    """One bucket.

    Attributes:
        client: a boto3 client.
        bucket: name of the bucket.
    """

    def __init__(self, connection: Connection, bucket: str) -> None:
        self.client = connect(connection)
        self.bucket = bucket
        self._connection = connection
        self._bucket_was_seen = False
        # Imports botocore, which is installed if there is a client.
        from internlm.utils.storage import s3_errors

        self._errors = s3_errors

    def call(
        self,
        operation: Callable[..., Result],
        what: str,
        is_wanted: Callable[[], bool] = lambda: True,
        **arguments: Any,
    ) -> Result:
        """Make a request to this bucket, and retry transient failures.

        Args:
            operation: a method of the client.
            what: for the log, such as "write 's3://bucket/key'".
            is_wanted: whether a failed request should still be retried.
            **arguments: arguments of the operation besides the bucket.
        """
        request = functools.partial(operation, Bucket=self.bucket, **arguments)
        return self._connection.retry_policy.run(
            request, lambda error: is_wanted() and self._errors.is_transient(error), what
        )

    def head(self, key: str) -> dict[str, Any] | None:
        """Metadata of an object (size, ETag ...); None when it does not exist."""
        try:
            found: dict[str, Any] = self.call(self.client.head_object, f"look for '{key}'", Key=key)
            return found
        except self.client.exceptions.ClientError as error:
            if not self._errors.is_missing(error):
                raise
        self._check_bucket()
        return None

    def explain(self, error: Exception) -> Explanation | None:
        if isinstance(error, FileNotFoundError):
            return Explanation("it does not exist", "check the spelling", is_missing=True)
        return self._errors.explain(error, self._connection, self.bucket, self.client.meta.endpoint_url)

    def _check_bucket(self) -> None:
        if self._bucket_was_seen:
            return
        try:
            self.call(self.client.head_bucket, f"look for bucket '{self.bucket}'")
        except self.client.exceptions.ClientError as error:
            if self._errors.is_missing(error):
                raise self._errors.NoBucketError(self.bucket) from error
            raise
        self._bucket_was_seen = True
