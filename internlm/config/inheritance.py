"""The `read_base` marker of config files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def read_base() -> Iterator[None]:
    """Mark imports in a config file as inheritance: `with read_base(): from _base_.default_runtime import *`.

    `load_config` recognises the block in the source and runs the named files in its place, looking beside the config
    file, then in each folder above it, then in the current folder. So this function itself does nothing; it lets the
    file also be read by tools that import it as plain Python.
    """
    yield
