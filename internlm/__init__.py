"""internlm: pretraining of large language models, from a laptop's CPU to a cluster.

Importing this package needs torch and numpy only; everything else is imported where it is used.
"""

from pathlib import Path as _Path

from internlm.utils.former_names import install as _install

__all__ = ["__version__"]


def _read_version() -> str:
    source_tree = _Path(__file__).resolve().parent.parent / "version.txt"
    if source_tree.is_file():
        return source_tree.read_text(encoding="utf-8").strip()
    from importlib.metadata import version

    return version("internlm")


__version__ = _read_version()

_install()
