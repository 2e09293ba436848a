"""The folders of data of a config: a local one as it is, one in an object store as its mirror in the cache."""

from __future__ import annotations

import time
from pathlib import Path

from internlm.config.schema import Config
from internlm.core.communication.objects import of_all_ranks
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.remote.mirror import DataCache, is_remote, listing_digest, local_folder
from internlm.utils.errors import RemoteDataError

_FRESH_SECONDS = 60.0
"""A folder is listed once for the checks and the build of a run."""

_listed: dict[tuple[str, DataCache], tuple[float, Path]] = {}


def train_folder(config: Config) -> str | Path | None:
    """data.train_folder; see `local_folder`.

    Raises:
        RemoteDataError: the folder in the object store cannot be listed, or the cache cannot be written.
    """
    return _local(config, config.data.train_folder)


def valid_folder(config: Config) -> str | Path | None:
    """data.valid_folder; see `train_folder`."""
    return _local(config, config.data.valid_folder)


def check_same_listing(config: Config, context: ParallelContext) -> None:
    """Check that all ranks have found the same files in data.train_folder; collective if it is in an object store.

    Raises:
        RemoteDataError: they have not.
    """
    folder = config.data.train_folder
    if folder is None or not is_remote(folder):
        return
    local = train_folder(config)
    assert local is not None
    digests = of_all_ranks(context, listing_digest(Path(local)))
    if len(set(digests)) > 1:
        raise RemoteDataError(
            f"data.train_folder = {folder!r}: ranks have found different files there, so something writes to it; start "
            "the run again when the folder is complete"
        )


def _local(config: Config, folder: str | None) -> str | Path | None:
    if folder is None or not is_remote(folder):
        return folder
    data = config.data
    cache = DataCache(None if data.cache_folder is None else Path(data.cache_folder), data.cache_bytes)
    now = time.monotonic()
    listed, found = _listed.get((folder, cache), (0.0, Path()))
    if not listed or now - listed > _FRESH_SECONDS:
        found = Path(local_folder(folder, cache))
        _listed[folder, cache] = time.monotonic(), found
    return found
