"""Rules on data in object stores and its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from internlm.config.problem import Problem
from internlm.config.schema import BlendEntryConfig, Config
from internlm.utils.errors import ConfigError
from internlm.utils.storage import storage_path


def remote_data(config: Config, world_size: int) -> Iterator[Problem]:
    """URLs of data must be of known stores; a cache is local, and only for data in a store."""
    data = config.data
    folders = {"data.train_folder": data.train_folder, **dict(_paths(data.blend, "data.blend"))}
    if isinstance(data.valid_folder, dict):
        folders |= {f"data.valid_folder[{name!r}]": each["path"] for name, each in data.valid_folder.items()}
    else:
        folders["data.valid_folder"] = data.valid_folder
    remote = {key: folder for key, folder in folders.items() if folder is not None and "://" in folder}
    for key, folder in remote.items():
        try:
            storage_path(folder)
        except ConfigError as error:
            yield Problem((key,), f"{key} = {folder!r}: {error}")
    if data.shuffle_files is not None and data.train_folder is None and not data.blend:
        yield Problem(
            ("data.shuffle_files", "data.train_folder"),
            f"data.shuffle_files = {data.shuffle_files} is the number of files to mix, and data.train_folder = None "
            "trains on random tokens; remove it",
        )
    if data.cache_folder is not None and "://" in data.cache_folder:
        yield Problem(
            ("data.cache_folder",), f"data.cache_folder = {data.cache_folder!r}: give a folder on a local disk"
        )
    for name in ("cache_folder", "cache_bytes"):
        value, key = getattr(data, name), f"data.{name}"
        if value is not None and not remote:
            yield Problem(
                (key, "data.train_folder", "data.valid_folder", "data.blend"),
                f"{key} = {value!r} is for data in an object store, such as data.train_folder = 's3://bucket/train', "
                "and all folders are local; remove it",
            )


def _paths(entries: Sequence[BlendEntryConfig], key: str) -> Iterator[tuple[str, str | None]]:
    """Key and path of each source of a blend."""
    for number, entry in enumerate(entries):
        yield f"{key}[{number}].path", entry.path
        yield from _paths(entry.blend, f"{key}[{number}].blend")
