"""Trying again, for a bounded time, what fails for a passing reason."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 8.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How long a store is waited for.

    Attributes:
        retry_seconds: after this time no further attempt is begun.
        timeout_seconds: how long a store may say nothing in one attempt.
    """

    retry_seconds: float
    timeout_seconds: float

    @classmethod
    def from_environment(cls) -> Patience:
        """INTERNLM_STORAGE_RETRY_SECONDS (60) and INTERNLM_STORAGE_TIMEOUT_SECONDS (20)."""
        return cls(
            _seconds("INTERNLM_STORAGE_RETRY_SECONDS", 60.0, least=0.0),
            _seconds("INTERNLM_STORAGE_TIMEOUT_SECONDS", 20.0, least=0.01),
        )

    def persist(self, attempt: Callable[[], Result], is_passing: Callable[[Exception], bool], what: str) -> Result:
        """`attempt()`, repeated with growing pauses while it fails for a passing reason and time is left.

        Args:
            what: for the log, such as "write 's3://bucket/key'".
        """
        deadline = time.monotonic() + self.retry_seconds
        longest_pause = FIRST_PAUSE_SECONDS
        told = False
        while True:
            try:
                return attempt()
            except Exception as error:
                # Many ranks fail at once; the chance keeps them from coming back at once.
                pause = random.uniform(0.5, 1.0) * longest_pause
                if not is_passing(error) or time.monotonic() + pause > deadline:
                    raise
                if not told:
                    logger.warning("cannot %s yet (%s); trying again for %g s", what, error, self.retry_seconds)
                    told = True
            time.sleep(pause)
            longest_pause = min(2 * longest_pause, LONGEST_PAUSE_SECONDS)


def _seconds(variable: str, default: float, least: float) -> float:
    text = os.environ.get(variable, "")
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= least:
        raise ConfigError(f"the environment variable {variable} is '{text}'; give a number of seconds")
    return seconds
