"""The validation sets that a config names."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from internlm.config.schema import Config
from internlm.config.schema.conversations import ConversationConfig
from internlm.config.schema.valid_folders import DOCUMENT_TYPES
from internlm.data.documents.folders import find_train_files, find_valid_sets, log_unread_files
from internlm.data.documents.valid_sets import ValidSet, folder_sets, held_out_sets, named_set
from internlm.data.remote.mirror import is_remote
from internlm.initialize.data_folders import local_data, train_folder
from internlm.initialize.file_formats import file_format, tokenized_format
from internlm.initialize.row_stream import rows_as_documents
from internlm.initialize.train_sources import train_sources
from internlm.utils.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class ValidPlace:
    """One folder or file that `data.valid_folder` names.

    Attributes:
        key: that names it, for messages.
        name: of its set; None where its subfolders are sets.
        folder: folder or file; the mirror of one in an object store.
        config: of the run, with the type of the files and its keys in the data section.
    """

    key: str
    name: str | None
    folder: str | Path
    config: Config

    @property
    def type(self) -> str:
        """As `data.type`."""
        return self.config.data.type


def valid_places(config: Config) -> list[ValidPlace]:
    """Every folder and file that `data.valid_folder` names, whether or not it is evaluated."""
    data = config.data
    if isinstance(data.valid_folder, str):
        return [ValidPlace("data.valid_folder", None, local_data(config, data.valid_folder), config)]
    places = []
    for name, each in (data.valid_folder or {}).items():
        given = {item: value for item, value in each.items() if item not in ("path", "type")}
        if given.get("conversations") is not None:
            given["conversations"] = ConversationConfig.model_validate(given["conversations"])
        of_set = config.model_copy(update={"data": data.of_type(each.get("type", data.type), given)})
        places.append(ValidPlace(f"data.valid_folder[{name!r}]", name, local_data(config, each["path"]), of_set))
    return places


def find_sets(config: Config, *, with_rows: bool = True) -> list[ValidSet]:
    """Find the validation sets of a run; none if evaluation is off.

    Args:
        config: of the run.
        with_rows: whether to include sets of rows, which are tokenized first.

    Raises:
        DataError: a folder is missing, has no file of its type, or a row cannot be read.
        ConfigError: two sets have the same name.
    """
    data = config.data
    if data.valid_every == 0:
        return []
    sets: list[ValidSet] = []
    for place in valid_places(config):
        folder = place.folder
        if place.type != "streaming":
            format = file_format(place.config)
        elif with_rows:
            folder = rows_as_documents(place.config, place.folder, train_sources(config))
            format = tokenized_format(place.config)
        else:
            continue
        sets += folder_sets(folder, format) if place.name is None else [named_set(place.name, folder, format)]
    if data.valid_fraction > 0:
        folder_of_train = train_folder(config)
        assert folder_of_train is not None
        sets += held_out_sets(
            folder_of_train, file_format(config), data.valid_fraction, data.min_length, data.min_length_dict
        )
    repeated = [name for name, count in Counter(each.name for each in sets).items() if count > 1]
    if repeated:
        raise ConfigError(
            f"data.valid_folder has a set '{repeated[0]}', and data.valid_fraction makes one of that name; rename the "
            "former, as in data.valid_folder = dict(NAME=path)"
        )
    return sets


def trained_on(config: Config) -> list[str]:
    """One line for each validation set with files that the run is trained on; sets of held-out documents have none."""
    if config.data.valid_every == 0:
        return []
    train_files = set()
    for source in train_sources(config):
        folder = train_folder(source.config)
        if folder is not None and source.config.data.type in DOCUMENT_TYPES:
            files, _ = find_train_files(folder, file_format(source.config))
            train_files |= {file.path.resolve() for file in files}
    notices = []
    for place in valid_places(config):
        if place.type == "streaming":
            continue
        sets = find_valid_sets(place.folder, file_format(place.config))
        both = [path for paths in sets.values() for path in paths if path.resolve() in train_files]
        if both:
            notices.append(
                f"{place.key}: {len(both):,} of its files are trained on, such as {both[0]}: its loss is too low"
            )
    return notices


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
    if now.train_folder is None or now.valid_fraction <= before.valid_fraction:
        return
    trained = [source.config.data.train_folder for source in train_sources(saved)]
    if _place(now.train_folder) in {_place(folder) for folder in trained if folder is not None}:
        raise CheckpointError(
            f"data.valid_fraction = {now.valid_fraction} holds out more documents of {now.train_folder} than "
            f"{before.valid_fraction}, that of {what}, which has been trained on some of them: their loss would be too "
            f"low. Restore data.valid_fraction = {before.valid_fraction} (a smaller one is possible)"
        )


def _place(folder: str) -> str:
    """The same text for every spelling of a folder."""
    return folder.rstrip("/") if is_remote(folder) else os.path.realpath(folder)


def log_unread_valid_files(config: Config) -> None:
    """Log the files in validation folders that are not read, such as text."""
    for place in valid_places(config) if config.data.valid_every > 0 else ():
        if place.type != "streaming":
            log_unread_files(place.folder, file_format(place.config))
