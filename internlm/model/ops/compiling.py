"""How ops behave inside compiled blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_when_compiled(function: F) -> F:
    """Mark a function whose result a compiled block may keep as a constant: it runs while the block is compiled.

    This is `torch.compiler.assume_constant_result`, which would import the whole compiler (over a second) for its mark.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
