"""Validates the data of a run before its first step."""

from __future__ import annotations

from internlm.config.schema import Config
from internlm.core.communication.objects import from_main_rank
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.documents.folder_checks import check_train_folder, check_valid_folder
from internlm.initialize.build_data import file_format, valid_files
from internlm.initialize.data_folders import train_folder
from internlm.initialize.row_stream import check_train_rows
from internlm.initialize.train_sources import train_sources
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def check_data(config: Config) -> list[str]:
    """Read a sample of the data of a run, for a second or two; used by `--dry-run`.

    Returns:
        One line per data set that says what was read; empty for random data.

    Raises:
        DataError: a folder is missing, a file is malformed or has an id outside the vocabulary, or a valid set has no
            token that contributes loss.
    """
    data, lines = config.data, []
    for source in train_sources(config):
        folder = train_folder(source.config)
        if source.config.data.type == "streaming":
            lines.append(check_train_rows(source.config))
        elif folder is not None:
            lines.append(str(check_train_folder(folder, file_format(source.config), config.model.vocab_size)))
    if data.valid_every > 0 and data.valid_folder is not None:
        valid_folder, format = valid_files(config)
        assert valid_folder is not None
        lines += map(str, check_valid_folder(valid_folder, format, config.model.vocab_size))
    return lines


def check_valid_sets(config: Config, context: ParallelContext) -> None:
    """Read every valid set on the main rank, so that a defect shows now and not at the first evaluation; collective.

    Raises:
        DataError: as `check_data`.
    """
    data = config.data
    if data.valid_every == 0 or data.valid_folder is None:
        return

    def find_problem() -> str | None:
        try:
            folder, format = valid_files(config)
            assert folder is not None
            for checked in check_valid_folder(folder, format, config.model.vocab_size):
                logger.info("%s", checked)
        except (DataError, OSError) as error:
            return str(error)
        return None

    problem = from_main_rank(context, find_problem)
    if problem is not None:
        raise DataError(problem)
