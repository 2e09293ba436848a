"""The first row of each block of a file; kept beside a file of a mirror, so that it is fetched only once for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internlm.data.documents.index_cache import IndexedFile, cached_or_built_array
from internlm.data.remote.local_file import find_mirrored


def kept_starts(file: IndexedFile, kind: str, count: Callable[[], Sequence[int]]) -> NDArray[np.int64]:
    """First row of each block, and the number of rows: int64 [blocks + 1].

    Args:
        file: of rows.
        kind: of its blocks.
        count: rows of each block, read from the file.
    """

    def build() -> NDArray[np.int64]:
        return np.concatenate(([0], np.cumsum(count(), dtype=np.int64))).astype(np.int64)

    def write(target: Path) -> None:
        np.save(target, build())

    if find_mirrored(file.path) is None:
        return build()
    return cached_or_built_array(file, kind, write)
