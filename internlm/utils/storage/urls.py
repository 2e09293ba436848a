"""Parsing of URLs into a store and a key."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from internlm.utils.errors import ConfigError, nearest
from internlm.utils.storage.fsspec_store import FsspecAddress
from internlm.utils.storage.local import LOCAL_STORE
from internlm.utils.storage.s3 import S3Address
from internlm.utils.storage.store import Store


class StoreAddress(Protocol):
    """Identifies a store; hashable, without a connection."""

    def open(self) -> Store:
        """The store; one connection per process.

        Raises:
            ConfigError: the package for it is not installed.
        """


@dataclass(frozen=True)
class LocalAddress:
    """The file systems of this machine."""

    def open(self) -> Store:
        return LOCAL_STORE


@dataclass(frozen=True)
class Location:
    """A parsed URL, `<root>/<key>`; for a local path, the key is the path.

    Attributes:
        address: address of the store.
        root: the URL up to the key; empty for a local path.
        key: see `Store`.
    """

    address: StoreAddress
    root: str
    key: str

    @property
    def is_local(self) -> bool:
        """Whether it is on a local disk."""
        return isinstance(self.address, LocalAddress)

    def url_of(self, key: str) -> str:
        """The URL of a key of the same store."""
        if self.is_local:
            return str(Path(key))
        return self.root + (key if self.root.endswith("/") or not key else f"/{key}")

    def open_store(self) -> Store:
        """The store."""
        return self.address.open()


KNOWN = (
    "/a/local/path",
    "local:/a/path",
    "s3://bucket/key",
    "gs://bucket/key",
    "oss://bucket/key",
    "boto3:s3://bucket.ENDPOINT/key",
    "volc:vc://bucket.ENDPOINT/key",
    "oss2:ali://bucket.ENDPOINT/key",
    "memory://key",
)
OSS_ENDPOINT = "OSS_ENDPOINT"

_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_BUCKET_AND_KEY = re.compile(r"(?P<root>(?P<prefix>[a-z0-9:]+)://(?P<bucket>[^/]+))/*(?P<key>.*)")
_NUMERIC_HOST = re.compile(r"[0-9]+(\.[0-9]+){3}(:[0-9]+)?")


@functools.lru_cache(maxsize=4096)
def locate(url: str) -> Location:
    """Parse a URL.

    Raises:
        ConfigError: it is malformed, or its prefix is unknown.
    """
    url = url.removeprefix("local:")
    if not _PREFIX.match(url):
        if not url:
            raise ConfigError("a path is empty; set a folder, or a URL such as 's3://bucket/key'")
        return Location(LocalAddress(), "", str(Path(url)))
    if url.startswith("memory://"):
        return Location(FsspecAddress("memory", ""), "memory://", url.removeprefix("memory://").strip("/"))
    match = _BUCKET_AND_KEY.fullmatch(url)
    if match and match["prefix"] in _PARSERS:
        return Location(_PARSERS[match["prefix"]](url, match["bucket"]), match["root"], match["key"].strip("/"))
    prefix = url[: url.find("://") + 3] if "://" in url else url.partition(":")[0] + ":"
    raise ConfigError(
        f"'{url}' has an unknown prefix.{nearest(prefix, _known_prefixes())} Known are: "
        f"{', '.join(KNOWN)}; write './{url}' for a local file of that name"
    )


def _known_prefixes() -> list[str]:
    return [spelling[: spelling.find("://") + 3] for spelling in KNOWN if "://" in spelling]


def _parse_gs(url: str, bucket: str) -> StoreAddress:
    return FsspecAddress("gs", bucket)


def _parse_s3(url: str, bucket: str) -> StoreAddress:
    host = bucket.partition(".")[2]
    # InternEvo also accepts 's3://bucket.10.0.0.1/key'; no AWS bucket can have such a name.
    return _parse_boto3(url, bucket) if _NUMERIC_HOST.fullmatch(host) else S3Address("s3", bucket)


def _parse_boto3(url: str, bucket: str) -> StoreAddress:
    name, _, host = bucket.partition(".")
    if not host:
        return S3Address("s3", bucket)
    # InternEvo uses plain HTTP, port 80, for such a host. A host with a name is on the internet and has TLS.
    is_plain = _NUMERIC_HOST.fullmatch(host) or ":" in host
    return S3Address("s3", name, f"http://{host}" if is_plain else f"https://{host}")


def _parse_tos(url: str, bucket: str) -> StoreAddress:
    name, host = _name_and_host(url, bucket, "tos-cn-beijing.volces.com")
    # The service has separate hosts for the S3 protocol.
    match = re.fullmatch(r"tos-(?:s3-)?((?:[a-z]+-)+[a-z0-9]+)(\..+)", host)
    return S3Address(
        "volc", name, f"https://tos-s3-{match[1]}{match[2]}" if match else f"https://{host}", match and match[1]
    )


def _parse_ali(url: str, bucket: str) -> StoreAddress:
    name, host = _name_and_host(url, bucket, "oss-cn-hangzhou.aliyuncs.com")
    return _oss_address(name, host)


def _parse_oss(url: str, bucket: str) -> StoreAddress:
    host = os.environ.get(OSS_ENDPOINT, "")
    if not host:
        raise ConfigError(
            f"'{url}' has no endpoint for the bucket; set {OSS_ENDPOINT} in the environment, for example "
            f"{OSS_ENDPOINT}=oss-cn-hangzhou.aliyuncs.com"
        )
    return _oss_address(bucket, host)


def _oss_address(bucket: str, host: str) -> StoreAddress:
    if "://" in host:
        return S3Address("oss", bucket, host)
    match = re.fullmatch(r"(?:s3\.)?(oss-.+\.aliyuncs\.com)", host)
    return S3Address("oss", bucket, f"https://s3.{match[1]}" if match else f"https://{host}")


def _name_and_host(url: str, bucket: str, example: str) -> tuple[str, str]:
    name, _, host = bucket.partition(".")
    if not host:
        raise ConfigError(f"'{url}' has no endpoint; write it after the bucket's name: '{bucket}.{example}'")
    return name, host


_PARSERS: dict[str, Callable[[str, str], StoreAddress]] = {
    "s3": _parse_s3,
    "gs": _parse_gs,
    "oss": _parse_oss,
    "boto3:s3": _parse_boto3,
    "volc:vc": _parse_tos,
    "vc": _parse_tos,
    "oss2:ali": _parse_ali,
    "ali": _parse_ali,
}
