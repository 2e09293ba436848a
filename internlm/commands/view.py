"""`internlm view`: a page with the curves, the layout and the timeline of a run, without a model."""

from __future__ import annotations

import argparse

from internlm.commands.server_options import add_server_options, api_key, bind, listen
from internlm.serve.run_folder import RunFolder
from internlm.utils.errors import ConfigError
from internlm.utils.logging import configure_logging, get_logger
from internlm.utils.paths import local_path

logger = get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "run_dir", type=local_path, metavar="RUN", help="folder of a run, with metrics.jsonl; it may be in progress"
    )
    add_server_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serve the page until interrupted; returns the exit code."""
    configure_logging()
    try:
        from internlm.serve.app import create_run_app
    except ImportError as error:
        raise ConfigError(f"the page needs {error.name}: pip install 'internlm[serve]'") from error
    folder = RunFolder(args.run_dir)
    app = create_run_app(folder, api_key(args, "see the run"))
    with bind(args) as taken:
        listen(app, taken, args, lambda address: logger.info("run '%s'; page: %s/", folder.path, address))
    return 0
