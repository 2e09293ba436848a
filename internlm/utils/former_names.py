"""Import errors for InternEvo's names that name the replacement.

This package shares InternEvo's name but not its modules. The names are a table (`internevo_names`), loaded only when an
import is about to fail.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

_PACKAGE = "internlm"


class FormerNames:
    """The last finder of the import system, asked when no other finds a module.

    `from package import name` asks it too when the package has no such name, as `name` may be a submodule.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> None:
        """Find no module.

        Raises:
            ImportError: `fullname` is a module or name of InternEvo.
        """
        if fullname.startswith(f"{_PACKAGE}."):
            from internlm.utils.internevo_names import explain_module, explain_name

            module, _, name = fullname.rpartition(".")
            _fail(fullname, explain_name(module, name) or explain_module(fullname))


def install() -> None:
    """Make failing imports of InternEvo's modules and names report the replacement."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())
    explain_former_names(_PACKAGE)


def explain_former_names(module_name: str) -> None:
    """Like `install`, for missing names of an existing module, for which the import system asks no finder."""

    def explain(name: str) -> object:
        if not name.startswith("__"):
            from internlm.utils.internevo_names import explain_name

            _fail(f"{module_name}.{name}", explain_name(module_name, name))
        raise AttributeError(f"module '{module_name}' has no attribute '{name}'")

    # Not a `__getattr__` written in the module: type checkers would then accept every name.
    sys.modules[module_name].__dict__["__getattr__"] = explain


def _fail(fullname: str, text: str | None) -> None:
    if text is not None:
        # Not a ModuleNotFoundError: `from package import name` replaces its message.
        raise ImportError(text, name=fullname)
