"""The validation sets that a config names."""

from __future__ import annotations

from collections import Counter

from internlm.config.schema import Config
from internlm.data.documents.document_file import FileFormat
from internlm.data.documents.folders import log_unread_files
from internlm.data.documents.valid_sets import ValidSet, folder_sets, held_out_sets, named_set
from internlm.initialize.file_formats import file_format, format_of_type
from internlm.utils.errors import CheckpointError, ConfigError


def find_sets(config: Config) -> list[ValidSet]:
    """Find the validation sets of a run; none if evaluation is off.

    Raises:
        DataError: a folder is missing, has no file of its type, or is in an object store.
        ConfigError: two sets have the same name.
    """
    data = config.data
    if data.valid_every == 0:
        return []
    sets: list[ValidSet] = []
    for name, folder, format in _folders(config):
        sets += folder_sets(folder, format) if name is None else [named_set(name, folder, format)]
    if data.valid_fraction > 0:
        assert data.train_folder is not None
        sets += held_out_sets(
            data.train_folder, file_format(config), data.valid_fraction, data.min_length, data.min_length_dict
        )
    repeated = [name for name, count in Counter(each.name for each in sets).items() if count > 1]
    if repeated:
        raise ConfigError(
            f"data.valid_folder has a set '{repeated[0]}', and data.valid_fraction makes one of that name; rename the "
            "former, as in data.valid_folder = dict(NAME=path)"
        )
    return sets


def check_held_out(saved: Config, config: Config, what: str) -> None:
    """Refuse to evaluate documents that the run of a checkpoint has been trained on.

    Args:
        saved: config of the checkpoint.
        config: of this run.
        what: names the checkpoint in messages.

    Raises:
        CheckpointError: this run holds out more documents of the same train folder.
    """
    before, now = saved.data, config.data
    if now.valid_fraction > before.valid_fraction and now.train_folder == before.train_folder:
        raise CheckpointError(
            f"data.valid_fraction = {now.valid_fraction} holds out more documents of {now.train_folder} than "
            f"{before.valid_fraction}, that of {what}, which has been trained on some of them: their loss would be too "
            f"low. Restore data.valid_fraction = {before.valid_fraction} (a smaller one is possible)"
        )


def log_unread_valid_files(config: Config) -> None:
    """Log the files in validation folders that are not read, such as text."""
    if config.data.valid_every > 0:
        for _, folder, format in _folders(config):
            log_unread_files(folder, format)


def valid_places(config: Config) -> list[tuple[str, str]]:
    """(config key, folder or file) of every validation folder, whether or not it is evaluated."""
    folder = config.data.valid_folder
    if isinstance(folder, dict):
        return [(f"data.valid_folder[{name!r}]", each["path"]) for name, each in folder.items()]
    return [] if folder is None else [("data.valid_folder", folder)]


def _folders(config: Config) -> list[tuple[str | None, str, FileFormat]]:
    """(name of the set, folder, format) of every validation folder; the name is None where subfolders are sets."""
    data = config.data
    if isinstance(data.valid_folder, dict):
        result: list[tuple[str | None, str, FileFormat]] = []
        for name, each in data.valid_folder.items():
            type_name = each.get("type", data.type)
            inherits = type_name == data.type
            dtype = each.get("array_dtype", data.array_dtype if inherits else None)
            separator = each.get("array_separator", data.array_separator if inherits else None)
            result.append((name, each["path"], format_of_type(type_name, dtype, separator)))
        return result
    return [] if data.valid_folder is None else [(None, data.valid_folder, file_format(config))]
