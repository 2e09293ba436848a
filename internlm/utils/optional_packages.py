"""Optional packages: whether they can be used, and if not, why."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util


@functools.cache
def why_unusable(module: str, *attributes: str) -> str | None:
    """The reason why `module` cannot be imported or lacks one of `attributes`; None when it can be used.

    Imports the module, once per process: a package built for another version of PyTorch or CUDA is found, but fails on
    import. Any exception of the import is a reason.
    """
    package = module.split(".", maxsplit=1)[0]
    try:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        found = importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name is not None and module.startswith(error.name):
            return f"{error.name} is not installed"
        first_line = str(error).strip().split("\n", maxsplit=1)[0]
        return f"{module} is installed but broken: {type(error).__name__}: {first_line}"
    missing = [name for name in attributes if not hasattr(found, name)]
    return f"{module} is installed but has no {', '.join(missing)}" if missing else None


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution; None when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
