"""How a URL is read: which store it means, and the key in it."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from internlm.utils.errors import ConfigError, nearest
from internlm.utils.storage.fsspec_store import FsspecPlace
from internlm.utils.storage.local import LOCAL_STORE
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


KNOWN = ("/a/local/path", "local:/a/path", "gs://bucket/key", "memory://key")
_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")


@functools.lru_cache(maxsize=4096)
def locate(url: str) -> Location:
    """Take a URL apart.

    Raises:
        ConfigError: it cannot be read, or its prefix is unknown.
    """
    url = url.removeprefix("local:")
    if not _PREFIX.match(url):
        if not url:
            raise ConfigError(
                "a path is empty; give a folder such as '/a/local/path' or a URL such as 's3://bucket/key'"
            )
        return Location(LocalPlace(), "", os.fspath(Path(url)))
    if url.startswith("memory://"):
        return Location(FsspecPlace("memory", ""), "memory://", url.removeprefix("memory://").strip("/"))
    if match := re.fullmatch(r"(gs://([^/]+))(?:/(.*))?", url):
        return Location(FsspecPlace("gs", match[2]), match[1], (match[3] or "").strip("/"))
    raise _unknown(url)


def _unknown(url: str) -> ConfigError:
    prefix = url.partition(":")[0]
    known = [spelling.partition(":")[0] for spelling in KNOWN]
    return ConfigError(
        f"'{url}' begins with '{prefix}:', which is not a known kind of storage.{nearest(prefix, known)} "
        f"Known are: {', '.join(KNOWN)}. A local file of that name is './{url}'."
    )
