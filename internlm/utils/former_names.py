"""Imports of InternEvo's names fail with an ImportError that says where each went.

This package has the name of InternEvo's and other modules. The names are data (`internevo_names`), read only when an
import is about to fail anyway.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_PACKAGE = "internlm"


class FormerNames:
    """The last of the import system's finders: is asked when no other has found a module.

    Also `from package import name` comes here, where the package has no such name, as that may be a module of it.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> None:
        """Find nothing.

        Raises:
            ImportError: it is a module or a name of InternEvo.
        """
        if fullname.startswith(f"{_PACKAGE}."):
            from internlm.utils.internevo_names import explain_module, explain_name

            module, _, name = fullname.rpartition(".")
            _fail(fullname, explain_name(module, name) or explain_module(fullname))


def install() -> None:
    """Make imports that fail say where InternEvo's modules and names went."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())
    explain_former_names(_PACKAGE)


def explain_former_names(module_name: str) -> None:
    """The same for names that are asked of a module that exists, under which the import system looks for no other."""

    def explain(name: str) -> object:
        if not name.startswith("__"):
            from internlm.utils.internevo_names import explain_name

            _fail(f"{module_name}.{name}", explain_name(module_name, name))
        raise AttributeError(f"module '{module_name}' has no attribute '{name}'")

    # Not a function `__getattr__` in the module, for which type checkers would take every name as there.
    sys.modules[module_name].__dict__["__getattr__"] = explain


def _fail(fullname: str, text: str | None) -> None:
    if text is not None:
        # Not a ModuleNotFoundError, which `from package import name` replaces by a message of its own.
        raise ImportError(text, name=fullname)
