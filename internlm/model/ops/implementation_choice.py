"""The answer to "what runs?": which implementation an op uses on a device, and why."""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """The implementation that an op uses, and the reason for it."""

    implementation: str
    reason: str
