"""Expansion of `~` in the paths of config files and command lines.

Command-line paths have the argparse type `local_path` or `path_text`; those of a config are `PathText` in its schema;
`storage_path` expands its argument. Variables such as $HOME are left to the shell.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from internlm.utils.errors import ConfigError

_LOCAL = "local:"


def expand_home(path: str) -> str:
    """Expand a leading `~` or `~user`, also after `local:`; other URLs are returned unchanged.

    Raises:
        ConfigError: there is no such user, or the user has no home folder.
    """
    prefix = _LOCAL if path.startswith(_LOCAL) else ""
    rest = path.removeprefix(_LOCAL)
    if not rest.startswith("~"):
        return path
    name = rest.partition("/")[0]
    expanded = os.path.expanduser(rest)
    # With an empty HOME, ~/data would be /data.
    if expanded == rest or (name == "~" and os.environ.get("HOME") == ""):
        who = "this user has no home folder, and HOME is not set" if name == "~" else f"there is no user '{name[1:]}'"
        raise ConfigError(f"'{path}': {who}; write the full path, or './{rest}' for a file of that name")
    return prefix + expanded


def path_text(text: str) -> str:
    """argparse type of a path or URL, as text."""
    try:
        return expand_home(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def local_path(text: str) -> Path:
    """argparse type of a local path; a URL is refused, which a path would turn into folders of that name."""
    expanded = path_text(text)
    if "://" in expanded:
        raise argparse.ArgumentTypeError(f"'{text}' is a URL, and a path on a local disk is expected; copy the files")
    return Path(expanded.removeprefix(_LOCAL))
