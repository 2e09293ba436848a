"""Findings of the checks of an exported model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "not checked"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: what was checked.
        outcome: of the check.
        text: the numbers, or the reason.
        advice: what to look at after a failure.
    """

    subject: str
    outcome: Outcome
    text: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f". {self.advice}" if self.outcome == "failed" and self.advice else ""
        return f"{self.subject}: {self.outcome}: {self.text}{advice}"


def has_failed(findings: Iterable[Finding]) -> bool:
    """Whether any of the checks failed."""
    return any(finding.outcome == "failed" for finding in findings)
