"""How a URL is read: which store it means, and the key in it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from internlm.utils.errors import ConfigError, nearest
from internlm.utils.storage.fsspec_store import FsspecPlace
from internlm.utils.storage.local import LOCAL_STORE
from internlm.utils.storage.s3 import S3Place
from internlm.utils.storage.store import Store


class Place(Protocol):
    """Which store; hashable, and without a connection."""

    def open(self) -> Store:
        """The store, connected once a process.

        Raises:
            ConfigError: the package for it is not installed.
        """


@dataclass(frozen=True)
class LocalPlace:
    """This machine's disks."""

    def open(self) -> Store:
        return LOCAL_STORE


@dataclass(frozen=True)
class Location:
    """A URL, taken apart: `<root>/<key>`; of a local path the key is all."""

    place: Place
    root: str
    key: str

    @property
    def is_local(self) -> bool:
        """Whether it is on a local disk."""
        return isinstance(self.place, LocalPlace)

    def url_of(self, key: str) -> str:
        """The URL of a key of the same store."""
        if self.is_local:
            return str(Path(key))
        return self.root + (key if self.root.endswith("/") or not key else f"/{key}")

    def open_store(self) -> Store:
        """The store."""
        return self.place.open()


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
    """Take a URL apart.

    Raises:
        ConfigError: it cannot be read, or its prefix is unknown.
    """
    url = url.removeprefix("local:")
    if not _PREFIX.match(url):
        if not url:
            raise ConfigError("a path is empty; give a folder, or a URL such as 's3://bucket/key'")
        return Location(LocalPlace(), "", str(Path(url)))
    if url.startswith("memory://"):
        return Location(FsspecPlace("memory", ""), "memory://", url.removeprefix("memory://").strip("/"))
    match = _BUCKET_AND_KEY.fullmatch(url)
    if match and match["prefix"] in _READERS:
        return Location(_READERS[match["prefix"]](url, match["bucket"]), match["root"], match["key"].strip("/"))
    prefix = url[: url.find("://") + 3] if "://" in url else url.partition(":")[0] + ":"
    raise ConfigError(
        f"'{url}' does not begin as a path or URL that is known does.{nearest(prefix, _beginnings())} Known are: "
        f"{', '.join(KNOWN)}. A local file of that name is './{url}'."
    )


def _beginnings() -> list[str]:
    return [spelling[: spelling.find("://") + 3] for spelling in KNOWN if "://" in spelling]


def _read_gs(url: str, bucket: str) -> Place:
    return FsspecPlace("gs", bucket)


def _read_s3(url: str, bucket: str) -> Place:
    host = bucket.partition(".")[2]
    # InternEvo takes 's3://bucket.10.0.0.1/key', too; no bucket of AWS is named so.
    return _read_boto3(url, bucket) if _NUMERIC_HOST.fullmatch(host) else S3Place("s3", bucket)


def _read_boto3(url: str, bucket: str) -> Place:
    name, _, host = bucket.partition(".")
    if not host:
        return S3Place("s3", bucket)
    # InternEvo speaks plain HTTP to port 80 of such a host. A host with a name is on the internet, so it has TLS.
    is_plain = _NUMERIC_HOST.fullmatch(host) or ":" in host
    return S3Place("s3", name, f"http://{host}" if is_plain else f"https://{host}")


def _read_tos(url: str, bucket: str) -> Place:
    name, host = _name_and_host(url, bucket, "tos-cn-beijing.volces.com")
    # The service has other hosts for S3's protocol than for its own.
    match = re.fullmatch(r"tos-(?:s3-)?((?:[a-z]+-)+[a-z0-9]+)(\..+)", host)
    return S3Place(
        "volc", name, f"https://tos-s3-{match[1]}{match[2]}" if match else f"https://{host}", match and match[1]
    )


def _read_ali(url: str, bucket: str) -> Place:
    name, host = _name_and_host(url, bucket, "oss-cn-hangzhou.aliyuncs.com")
    return _oss_place(name, host)


def _read_oss(url: str, bucket: str) -> Place:
    host = os.environ.get(OSS_ENDPOINT, "")
    if not host:
        raise ConfigError(
            f"'{url}' does not say where the bucket is; set {OSS_ENDPOINT} in the environment, for example "
            f"{OSS_ENDPOINT}=oss-cn-hangzhou.aliyuncs.com"
        )
    return _oss_place(bucket, host)


def _oss_place(bucket: str, host: str) -> Place:
    if "://" in host:
        return S3Place("oss", bucket, host)
    match = re.fullmatch(r"(?:s3\.)?(oss-.+\.aliyuncs\.com)", host)
    return S3Place("oss", bucket, f"https://s3.{match[1]}" if match else f"https://{host}")


def _name_and_host(url: str, bucket: str, example: str) -> tuple[str, str]:
    name, _, host = bucket.partition(".")
    if not host:
        raise ConfigError(f"'{url}' has no endpoint; write it after the bucket's name: '{bucket}.{example}'")
    return name, host


_READERS: dict[str, Callable[[str, str], Place]] = {
    "s3": _read_s3,
    "gs": _read_gs,
    "oss": _read_oss,
    "boto3:s3": _read_boto3,
    "volc:vc": _read_tos,
    "vc": _read_tos,
    "oss2:ali": _read_ali,
    "ali": _read_ali,
}
