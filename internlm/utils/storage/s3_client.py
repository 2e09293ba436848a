"""Clients of stores with the S3 protocol: endpoint, credentials and settings."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, Literal

from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.storage.retry import RetryPolicy

logger = get_logger(__name__)

INSTALL = "pip install 'internlm[s3]'"
MAX_CONNECTIONS = 16

Service = Literal["s3", "volc", "oss"]
GENERIC_VARIABLES = ("ACCESS_KEY", "SECRET_ACCESS_KEY")
# InternEvo's names first, then the vendor's. For "s3", boto3 itself searches the AWS_* variables after these.
VARIABLES: dict[Service, tuple[tuple[str, str], ...]] = {
    "s3": (("S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY_ID"),),
    "volc": (("VOLC_ACCESS_KEY_ID", "VOLC_SECRET_ACCESS_KEY_ID"),),
    "oss": (("ALI_ACCESS_KEY_ID", "ALI_SECRET_ACCESS_KEY_ID"), ("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET")),
}


@dataclass(frozen=True)
class Credentials:
    """An access key and its secret."""

    access_key: str
    secret: str

    def __repr__(self) -> str:
        return f"Credentials({self.access_key!r}, ...)"

    @classmethod
    def from_environment(cls, service: Service) -> Credentials | None:
        """The credentials of a service in the environment; None to let boto3 search (AWS_*, profiles, roles).

        Raises:
            ConfigError: only one variable of a pair is set.
        """
        pairs = [GENERIC_VARIABLES, *VARIABLES[service]]
        given = [pair for pair in pairs if any(os.environ.get(name) for name in pair)]
        if not given:
            return None
        chosen = given[0]
        for name in chosen:
            if not os.environ.get(name):
                raise ConfigError(
                    f"the environment variable {name} is not set, but {' and '.join(chosen)} belong together"
                )
        if len(given) > 1:
            _log_choice(chosen, given[1])
        return cls(os.environ[chosen[0]], os.environ[chosen[1]])


@functools.lru_cache
def _log_choice(chosen: tuple[str, str], other: tuple[str, str]) -> None:
    logger.warning("both %s and %s are set in the environment; %s and %s are used", chosen[0], other[0], *chosen)


@dataclass(frozen=True)
class Connection:
    """Everything that determines a client."""

    service: Service
    endpoint: str | None
    region: str | None
    credentials: Credentials | None
    retry_policy: RetryPolicy

    @property
    def variables(self) -> str:
        """Names of the environment variables with the credentials, for messages."""
        names = [" and ".join(pair) for pair in VARIABLES[self.service]]
        return " or ".join([*names, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"] if self.service == "s3" else names)


@functools.lru_cache
def connect(connection: Connection) -> Any:
    """The boto3 client of this process; threads may share it.

    Raises:
        ConfigError: boto3 is not installed.
    """
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise ConfigError(f"s3:// and other object stores need the package boto3: {INSTALL}") from error
    retry_policy = connection.retry_policy
    credentials = connection.credentials
    config = Config(
        connect_timeout=min(10.0, retry_policy.timeout_seconds),
        read_timeout=retry_policy.timeout_seconds,
        max_pool_connections=MAX_CONNECTIONS,
        # `RetryPolicy.run` retries instead, for a bounded time.
        retries={"total_max_attempts": 1},
        # Only AWS supports the newer checksums. TLS, or else the request's signature, protects the content.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # TOS and OSS require the bucket in the host name; OSS refuses uploads with signature version 4.
        s3=None if connection.service == "s3" else {"addressing_style": "virtual"},
        signature_version="s3" if connection.service == "oss" else None,
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=connection.endpoint,
        region_name=connection.region,
        aws_access_key_id=credentials.access_key if credentials else None,
        aws_secret_access_key=credentials.secret if credentials else None,
        config=config,
    )


# A forked process must not share the connections of a client.
os.register_at_fork(after_in_child=connect.cache_clear)
