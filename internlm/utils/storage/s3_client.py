"""Connecting to a store that speaks S3: endpoint, credentials, and what its errors mean."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, Literal

from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.storage.retry import Patience

logger = get_logger(__name__)

INSTALL = "pip install 'internlm[s3]'"
MAX_CONNECTIONS = 16

Service = Literal["s3", "volc", "oss"]
GENERIC_VARIABLES = ("ACCESS_KEY", "SECRET_ACCESS_KEY")
# InternEvo's names first, then the vendor's own. For "s3" the AWS_* variables follow, by the library's own search.
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
        """What the environment names for a service; None: the library's own search (AWS_*, profiles, roles)."""
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
            _tell_choice(chosen, given[1])
        return cls(os.environ[chosen[0]], os.environ[chosen[1]])


@functools.lru_cache
def _tell_choice(chosen: tuple[str, str], other: tuple[str, str]) -> None:
    logger.warning("both %s and %s are set in the environment; %s and %s are used", chosen[0], other[0], *chosen)


@dataclass(frozen=True)
class Connection:
    """All that a client is made from."""

    service: Service
    endpoint: str | None
    region: str | None
    credentials: Credentials | None
    patience: Patience

    @property
    def variables(self) -> str:
        """The environment variables that hold the credentials, for messages."""
        names = [" and ".join(pair) for pair in VARIABLES[self.service]]
        return " or ".join([*names, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"] if self.service == "s3" else names)


@functools.lru_cache
def connect(connection: Connection) -> Any:
    """The client of this process; threads may share it.

    Raises:
        ConfigError: boto3 is not installed.
    """
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise ConfigError(f"s3:// and other object stores need the package boto3: {INSTALL}") from error
    patience = connection.patience
    credentials = connection.credentials
    config = Config(
        connect_timeout=min(10.0, patience.timeout_seconds),
        read_timeout=patience.timeout_seconds,
        max_pool_connections=MAX_CONNECTIONS,
        # `Patience.persist` does it, for a bounded time.
        retries={"total_max_attempts": 1},
        # Only AWS knows the newer checksums. What is sent is covered by TLS, or else by the request's signature.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # Both services want the bucket in the host's name; OSS takes no uploads signed by version 4.
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


# A client's connections must not be shared with a forked process.
os.register_at_fork(after_in_child=connect.cache_clear)
