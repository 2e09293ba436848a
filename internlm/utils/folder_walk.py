"""Walks through folders, also through links to folders, without end only if the links have none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path


def walk_links(
    folder: str | Path, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk as `os.walk` with `followlinks`, without links to a folder that contains the link.

    Following those would find each file again and again, until the path is too long for the operating system. Other
    links are followed, also several to the same folder.

    Args:
        folder: where to start.
        onerror: see `os.walk`.

    Yields:
        (folder, names of subfolders, names of files); removing a subfolder from its list skips it.
    """
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=onerror):
        above = os.path.realpath(place)
        subfolders[:] = [
            name
            for name in subfolders
            if not (os.path.islink(link := os.path.join(place, name)) and _contains(os.path.realpath(link), above))
        ]
        yield place, subfolders, names


def _contains(folder: str, below: str) -> bool:
    return os.path.commonpath([folder, below]) == folder
