"""The folders of data of a config: a local one as it is, one in an object store as its mirror in the cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from internlm.config.schema import Config
from internlm.core.communication.objects import of_all_ranks
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.remote.fetch_ahead import size_to_fetch
from internlm.data.remote.mirror import DataCache, is_remote, listing_digest, local_folder
from internlm.utils.errors import DataError, RemoteDataError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

_FRESH_SECONDS = 60.0
"""A folder is listed once for the checks and the build of a run."""

_listed: dict[tuple[str, DataCache], tuple[float, Path]] = {}


def train_folder(config: Config) -> str | Path | None:
    """data.train_folder; see `local_folder`.

    Raises:
        RemoteDataError: the folder in the object store cannot be listed, or the cache cannot be written.
    """
    folder = config.data.train_folder
    return None if folder is None else local_data(config, folder)


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


def check_same_on_all_ranks(context: ParallelContext, what: str, facts: Mapping[str, object]) -> None:
    """Check that all ranks have found the same data; collective.

    Args:
        context: of this rank.
        what: the data, for messages.
        facts: what must be equal, by name.

    Raises:
        DataError: it is not.
    """
    by_rank = of_all_ranks(context, {name: repr(value) for name, value in facts.items()})
    first = by_rank[0]
    for rank, others in enumerate(by_rank):
        if others != first:
            differing = "; ".join(
                f"{name} is {first.get(name)} on rank 0 and {others.get(name)} on rank {rank}"
                for name in sorted(first.keys() | others.keys())
                if first.get(name) != others.get(name)
            )
            raise DataError(
                f"{what}: ranks have found different data ({differing}); copy the same files to every machine"
            )


def log_small_cache(config: Config, paths: Sequence[Path]) -> None:
    """Warn if the order of samples needs more files at a time than the cache has room for."""
    size, bound = size_to_fetch(paths)
    window = config.data.shuffle_files
    if bound is None or size <= bound:
        return
    if window is None:
        logger.warning(
            "data.cache_bytes = %s is less than the %s bytes of the files in %s, read in random order, "
            "so they are fetched again and again; set data.shuffle_files, or raise data.cache_bytes",
            f"{bound:,}", f"{size:,}", config.data.train_folder,
        )  # fmt: skip
    elif (needed := 2 * window * max(path.stat().st_size for path in paths)) > bound:
        logger.warning(
            "data.cache_bytes = %s is less than two times data.shuffle_files = %d files of %s (%s bytes), so files are "
            "not all fetched before they are needed; raise it, or lower data.shuffle_files",
            f"{bound:,}", window, config.data.train_folder, f"{needed:,}",
        )  # fmt: skip


def local_data(config: Config, folder: str) -> str | Path:
    """A folder of training or validation data; see `train_folder`."""
    if not is_remote(folder):
        return folder
    data = config.data
    cache = DataCache(None if data.cache_folder is None else Path(data.cache_folder), data.cache_bytes)
    now = time.monotonic()
    listed, found = _listed.get((folder, cache), (0.0, Path()))
    if not listed or now - listed > _FRESH_SECONDS:
        found = Path(local_folder(folder, cache))
        _listed[folder, cache] = time.monotonic(), found
    return found
