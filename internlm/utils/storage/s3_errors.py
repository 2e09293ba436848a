"""What the errors of an S3 client mean. Imported only where boto3 is there."""

from __future__ import annotations

import botocore.exceptions as boto
import urllib3.exceptions
from botocore.parsers import ResponseParserError

from internlm.utils.storage.failures import Explanation
from internlm.utils.storage.s3_client import Connection

PASSING_CODES = {
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "InternalError",
    "ServiceUnavailable",
    "IncompleteBody",
    "OperationAborted",
}
KEY_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
REGION_CODES = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}


class NoBucketError(Exception):
    """There is no such bucket; a HEAD request's 404 does not say whether that or the key is missing."""


def code_of(error: Exception) -> str:
    """The store's name of an error, such as 'NoSuchKey', or its HTTP status; '' when no store answered."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, boto.ClientError) else ""


def status_of(error: Exception) -> int:
    """The HTTP status of the store's answer; 0 when none came."""
    if not isinstance(error, boto.ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_missing(error: Exception) -> bool:
    """Whether the store says that there is no such object."""
    return code_of(error) in ("NoSuchKey", "404", "NotFound")


def is_passing(error: Exception) -> bool:
    """Whether another attempt may succeed: no answer, a cut connection, 5xx, or too many requests."""
    if isinstance(error, boto.ClientError):
        return status_of(error) >= 500 or status_of(error) == 429 or code_of(error) in PASSING_CODES
    if isinstance(error, boto.SSLError):
        return "CERTIFICATE" not in str(error).upper()
    return isinstance(
        error,
        (
            boto.ConnectionError,
            boto.HTTPClientError,
            boto.IncompleteReadError,
            boto.ResponseStreamingError,
            urllib3.exceptions.HTTPError,
            TimeoutError,
            ConnectionError,
        ),
    )


def explain(error: Exception, connection: Connection, bucket: str, endpoint: str) -> Explanation | None:
    """Cause and fix of an error; None for a defect of ours."""
    code = code_of(error)
    if isinstance(error, NoBucketError) or code == "NoSuchBucket":
        cause = f"there is no bucket '{bucket}' at {endpoint}"
        return Explanation(cause, "create it, or check the spelling of bucket and endpoint", is_missing=True)
    if code == "NoSuchKey":
        return Explanation("it does not exist", "check the spelling", is_missing=True)
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
        return Explanation("no credentials were found", f"set {connection.variables} in the environment")
    if code in KEY_CODES:
        return Explanation(f"{endpoint} does not accept the credentials ({code})", f"check {connection.variables}")
    if status_of(error) == 403:
        return Explanation(
            f"access to bucket '{bucket}' at {endpoint} is denied ({code})",
            f"let the owner grant it, or use other credentials: {connection.variables}",
        )
    if code == "PreconditionFailed":
        return Explanation("it was replaced while it was read", "read it again when nobody writes it")
    if code in REGION_CODES or status_of(error) in (301, 307):
        return Explanation(f"the bucket is in another region ({error})", "set AWS_REGION to the bucket's region")
    if isinstance(error, (boto.ParamValidationError, ValueError)) and "bucket" in str(error).lower():
        return Explanation(f"'{bucket}' cannot be a bucket's name", "check the URL; doc/storage.md lists the spellings")
    if isinstance(error, ResponseParserError) or code in ("404", "405", "MethodNotAllowed"):
        # What a web server says to a request that it does not know; where a store says 404, its name is handled above.
        return Explanation(f"what answers at {endpoint} does not speak S3", "check the endpoint")
    seconds = f"{connection.patience.retry_seconds:g} s"
    if isinstance(error, boto.ClientError):
        lasting = f" for {seconds}" if is_passing(error) else ""
        return Explanation(
            f"{endpoint} answered {status_of(error)} {code}{lasting}",
            "try again later; if it stays so, ask those who run the store",
        )
    if is_passing(error):
        return Explanation(
            f"{endpoint} could not be reached for {seconds} ({error})", "check the network, and the endpoint's spelling"
        )
    if isinstance(error, (boto.BotoCoreError, OSError)):
        return Explanation(f"{type(error).__name__}: {error}", "check the URL, the network and the credentials")
    return None
