"""Logging. Library code logs to `get_logger(__name__)`; entry points call `configure_logging`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from internlm.utils.place_names import with_place_names

ROOT_LOGGER = "internlm"


def get_logger(name: str = ROOT_LOGGER) -> logging.Logger:
    """A logger below the project's root logger."""
    return logging.getLogger(name if name.startswith(ROOT_LOGGER) else f"{ROOT_LOGGER}.{name}")


def configure_logging(rank: int = 0, log_file: Path | None = None, level: int = logging.INFO) -> None:
    """Log to stderr (rank 0: everything; other ranks: warnings and above) and to `log_file`.

    Replaces the handlers of an earlier call, so that one process can make several runs.
    """
    logger = logging.getLogger(ROOT_LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)
    logger.propagate = False
    formatter = _PlaceNamingFormatter(f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s", "%H:%M:%S")
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(level if rank == 0 else logging.WARNING)
    console.setFormatter(formatter)
    logger.addHandler(console)
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        file_handler = logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace")
        file_handler.setFormatter(formatter)
        logger.addHandler(file_handler)


class _PlaceNamingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return with_place_names(super().format(record))
