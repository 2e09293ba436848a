"""Checks of `internlm.utils.layout_checks` as rules of the config: their arguments get the names of keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from internlm.config.problem import Problem
from internlm.utils.layout_checks import LayoutError

_KEY = re.compile(r"[a-z]\w*(?:\.\w+)+")


def layout_problems(check: Callable[[], object], names: Mapping[str, str]) -> Iterator[Problem]:
    """The problem that a check finds, if any.

    Args:
        check: may raise a `LayoutError`.
        names: argument of the check -> its name in the message; the keys in it are those of the problem.
    """
    try:
        check()
    except LayoutError as error:
        keys = [key for argument in error.arguments for key in _KEY.findall(names.get(argument, ""))]
        yield Problem(tuple(keys), error.named(names))
