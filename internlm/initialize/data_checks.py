"""Looks into the data of a run before its first step."""

from __future__ import annotations

from internlm.config.schema import Config
from internlm.core.communication.objects import from_main_rank
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.documents.folder_checks import check_train_folder, check_valid_folder
from internlm.initialize.build_data import file_format
from internlm.utils.errors import DataError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


def check_data(config: Config) -> list[str]:
    """Read the data that a run with this config would, as far as a second or two suffice; for `--dry-run`.

    Returns:
        What was read, one line a set; none for random data.

    Raises:
        DataError: a folder is missing, a file is malformed or has an id outside of the vocabulary, or a valid set has
            no token that contributes loss.
    """
    data, lines = config.data, []
    if data.train_folder is not None:
        lines.append(str(check_train_folder(data.train_folder, file_format(config), config.model.vocab_size)))
    if data.valid_every > 0 and data.valid_folder is not None:
        lines += map(str, check_valid_folder(data.valid_folder, file_format(config), config.model.vocab_size))
    return lines


def check_valid_sets(config: Config, context: ParallelContext) -> None:
    """Read every valid set now, and not in the middle of a run; collective. The main rank reads for all.

    Raises:
        DataError: as `check_data`.
    """
    data = config.data
    if data.valid_every == 0 or data.valid_folder is None:
        return
    folder = data.valid_folder

    def look() -> str | None:
        try:
            for checked in check_valid_folder(folder, file_format(config), config.model.vocab_size):
                logger.info("%s", checked)
        except (DataError, OSError) as error:
            return str(error)
        return None

    mistake = from_main_rank(context, look)
    if mistake is not None:
        raise DataError(mistake)
