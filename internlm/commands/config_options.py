"""Command-line options shared by all commands that read a config file."""

from __future__ import annotations

import argparse

from internlm.utils.paths import local_path


def add_config_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Declare `--config` as `config` and `--set` as `overrides`."""
    parser.add_argument("--config", required=required, type=local_path, metavar="FILE.py", help="the config file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        dest="overrides",
        help="override a key of the config; repeatable",
    )
