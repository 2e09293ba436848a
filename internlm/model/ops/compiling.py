"""Helpers for ops inside compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_when_compiled(function: F) -> F:
    """Mark a function whose result is constant in a compiled block: it runs once, during compilation.

    Equivalent to `torch.compiler.assume_constant_result`, which would import the compiler (over a second).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
