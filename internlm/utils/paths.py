"""What a user writes for a path: `~` is a home folder, in config files and on the command line alike.

Paths on the command line have `local_path` or `path_text` as their argparse type; those of a config are `PathText` in
its schema; `storage_path` expands what it gets. Variables such as $HOME are left to the shell.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from internlm.utils.errors import ConfigError

_LOCAL = "local:"


def expand_home(path: str) -> str:
    """`path` with the home folder for a leading `~` or `~user`, also behind `local:`. Other URLs stay as they are.

    Raises:
        ConfigError: there is no such user, or this user has no home.
    """
    prefix = _LOCAL if path.startswith(_LOCAL) else ""
    rest = path.removeprefix(_LOCAL)
    if not rest.startswith("~"):
        return path
    name = rest.partition("/")[0]
    expanded = os.path.expanduser(rest)
    # An empty HOME would make ~/data a folder in the root.
    if expanded == rest or (name == "~" and os.environ.get("HOME") == ""):
        who = "this user has no home folder, and HOME is not set" if name == "~" else f"there is no user '{name[1:]}'"
        raise ConfigError(f"'{path}': {who}; write the whole path, or './{rest}' for a file of that name")
    return prefix + expanded


def path_text(text: str) -> str:
    """An argparse type: a path or URL as text."""
    try:
        return expand_home(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def local_path(text: str) -> Path:
    """An argparse type: a path on this machine."""
    return Path(path_text(text))
