"""The record of which implementation an op uses on a device, and why."""

from __future__ import annotations

from typing import NamedTuple


class Choice(NamedTuple):
    """The implementation of an op, and the reason for it; both for display."""

    implementation: str
    reason: str
