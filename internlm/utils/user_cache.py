"""The cache folder of a user."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """This program's cache folder; it may not exist yet.

    For a user without a home folder, as in some containers, it is below the working directory.
    """
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "internlm"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path.cwd()
    return home / ".cache" / "internlm"
