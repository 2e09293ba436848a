"""Validates the data of a run before its first step."""

from __future__ import annotations

from internlm.config.schema import Config
from internlm.core.communication.objects import from_main_rank
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.documents import folder_checks
from internlm.initialize.build_data import build_replay_stream
from internlm.initialize.data_folders import train_folder
from internlm.initialize.file_formats import file_format
from internlm.initialize.row_stream import check_train_rows
from internlm.initialize.train_sources import train_sources
from internlm.initialize.valid_sets import find_sets
from internlm.utils.errors import DataError, UserError
from internlm.utils.logging import get_logger
from internlm.utils.place_names import with_place_names

logger = get_logger(__name__)


def check_data(config: Config, context: ParallelContext) -> list[str]:
    """Read a sample of the data of a run, for a second or two; used by `--dry-run`.

    Returns:
        One line per data set that says what was read; empty for random data.

    Raises:
        DataError: a folder is missing, a file is malformed or has an id outside the vocabulary, or a valid set has no
            token that contributes loss.
    """
    lines: list[str] = []
    vocab_size = config.model.vocab_size
    for source in train_sources(config):
        folder = train_folder(source.config)
        if source.config.data.type == "streaming":
            lines.append(check_train_rows(source.config))
        elif source.config.data.type == "mocked":
            lines.append(build_replay_stream(source.config, context).check())
        elif folder is not None:
            lines.append(str(folder_checks.check_train_folder(folder, file_format(source.config), vocab_size)))
    lines += map(str, folder_checks.check_valid_sets(find_sets(config), vocab_size))
    return list(map(with_place_names, lines))


def check_valid_sets(config: Config, context: ParallelContext) -> None:
    """Read every valid set on the main rank, so that a defect shows now and not at the first evaluation; collective.

    Raises:
        DataError: as `check_data`.
    """

    def find_problem() -> str | None:
        try:
            for checked in folder_checks.check_valid_sets(find_sets(config), config.model.vocab_size):
                logger.info("%s", checked)
        except (UserError, OSError) as error:
            return str(error)
        return None

    problem = from_main_rank(context, find_problem)
    if problem is not None:
        raise DataError(problem)
