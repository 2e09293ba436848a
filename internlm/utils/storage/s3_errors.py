"""Classification and explanation of the errors of an S3 client. Imported only where boto3 is installed."""

from __future__ import annotations

import botocore.exceptions as boto
import urllib3.exceptions
from botocore.parsers import ResponseParserError

from internlm.utils.storage.failures import Explanation
from internlm.utils.storage.s3_client import Connection

TRANSIENT_CODES = {
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
    """The bucket does not exist. (The 404 of a HEAD request does not tell whether bucket or key is missing.)"""


def code_of(error: Exception) -> str:
    """The error code of the store, such as 'NoSuchKey', or the HTTP status; '' when there was no response."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, boto.ClientError) else ""


def status_of(error: Exception) -> int:
    """The HTTP status of the response; 0 when there was none."""
    if not isinstance(error, boto.ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_missing(error: Exception) -> bool:
    """Whether the object does not exist."""
    return code_of(error) in ("NoSuchKey", "404", "NotFound")


def is_transient(error: Exception) -> bool:
    """Whether a retry may succeed: no response, a dropped connection, a 5xx status, or too many requests."""
    if isinstance(error, boto.ClientError):
        return status_of(error) >= 500 or status_of(error) == 429 or code_of(error) in TRANSIENT_CODES
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
    """Cause and fix of an error; None for a defect of this project."""
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
        return Explanation("it was replaced while it was read", "read it again while nothing writes to it")
    if code in REGION_CODES or status_of(error) in (301, 307):
        return Explanation(f"the bucket is in another region ({error})", "set AWS_REGION to the bucket's region")
    if isinstance(error, (boto.ParamValidationError, ValueError)) and "bucket" in str(error).lower():
        return Explanation(f"'{bucket}' cannot be a bucket's name", "check the URL; doc/storage.md lists the spellings")
    if isinstance(error, ResponseParserError) or code in ("404", "405", "MethodNotAllowed"):
        # The response of a web server that is not an object store; a 404 of a store has one of the codes above.
        return Explanation(f"the server at {endpoint} does not speak the S3 protocol", "check the endpoint")
    seconds = f"{connection.retry_policy.retry_seconds:g} s"
    if isinstance(error, boto.ClientError):
        lasting = f" for {seconds}" if is_transient(error) else ""
        return Explanation(
            f"{endpoint} answered {status_of(error)} {code}{lasting}",
            "try again later; if it persists, contact the operator of the store",
        )
    if is_transient(error):
        return Explanation(
            f"{endpoint} could not be reached for {seconds} ({error})", "check the network, and the endpoint's spelling"
        )
    if isinstance(error, (boto.BotoCoreError, OSError)):
        return Explanation(f"{type(error).__name__}: {error}", "check the URL, the network and the credentials")
    return None
