"""Retries of transient failures, for a bounded time."""

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
class RetryPolicy:
    """When a failed request is retried.

    Attributes:
        retry_seconds: time after which no further attempt starts.
        timeout_seconds: time that a store may stay silent within one attempt.
    """

    retry_seconds: float
    timeout_seconds: float

    @classmethod
    def from_environment(cls) -> RetryPolicy:
        """The policy in INTERNLM_STORAGE_RETRY_SECONDS (default 60) and INTERNLM_STORAGE_TIMEOUT_SECONDS (20).

        Raises:
            ConfigError: one of them is not a number of seconds.
        """
        return cls(
            _seconds("INTERNLM_STORAGE_RETRY_SECONDS", 60.0, least=0.0),
            _seconds("INTERNLM_STORAGE_TIMEOUT_SECONDS", 20.0, least=0.01),
        )

    def run(self, attempt: Callable[[], Result], is_transient: Callable[[Exception], bool], what: str) -> Result:
        """Call `attempt` until it succeeds, with exponential backoff, and return its result.

        Args:
            attempt: makes one request.
            is_transient: whether a request that raised this may succeed later; other errors are raised at once.
            what: for the log, such as "write 's3://bucket/key'".

        Raises:
            Exception: that of the last attempt.
        """
        deadline = time.monotonic() + self.retry_seconds
        longest_pause = FIRST_PAUSE_SECONDS
        is_logged = False
        while True:
            try:
                return attempt()
            except Exception as error:
                # Jitter: many ranks fail at the same time and must not retry at the same time.
                pause = random.uniform(0.5, 1.0) * longest_pause
                if not is_transient(error) or time.monotonic() + pause > deadline:
                    raise
                if not is_logged:
                    logger.warning("cannot %s yet (%s); retrying for %g s", what, error, self.retry_seconds)
                    is_logged = True
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
        raise ConfigError(f"the environment variable {variable} is '{text}'; set it to a number of seconds")
    return seconds
