"""The options of commands that listen for requests: where, and which key requests must have."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger
from internlm.utils.paths import local_path

logger = get_logger(__name__)

KEY_VARIABLE = "INTERNLM_API_KEY"


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Declare where to listen."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--api-key-file",
        type=local_path,
        metavar="FILE",
        help=f"file with the key that requests must have (default: the environment variable {KEY_VARIABLE}, if set)",
    )


def port_problems(args: argparse.Namespace) -> dict[str, bool]:
    """A rule on the options -> whether it holds."""
    return {f"--port {args.port}: must be from 0 to 65535": 0 <= args.port <= 65535}


def api_key(args: argparse.Namespace, what: str) -> str | None:
    """The key that requests must have; None if there is none, with a warning where others can reach the server.

    Args:
        args: parsed options.
        what: whoever reaches the server without a key can do.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    if args.api_key_file is None:
        key = os.environ.get(KEY_VARIABLE) or None
        if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
            logger.warning("--host %s: whoever reaches this machine can %s; set %s", args.host, what, KEY_VARIABLE)
        return key
    try:
        key = args.api_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {args.api_key_file}: cannot be read: {error}") from error
    if not key:
        raise ConfigError(f"--api-key-file {args.api_key_file}: is empty")
    return key


def listen(app: Any, args: argparse.Namespace, announce: Callable[[str], None]) -> None:
    """Serve an application until Ctrl-C; needs uvicorn.

    Args:
        app: an ASGI application.
        args: parsed options.
        announce: called with the address once the server listens.

    Raises:
        ConfigError: the server cannot listen there.
    """
    import uvicorn

    config = uvicorn.Config(app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=5)
    try:
        listening = config.bind_socket()
        listening.listen(config.backlog)
        host = f"[{args.host}]" if ":" in args.host else args.host
        announce(f"http://{host}:{listening.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listening])
    except SystemExit as error:
        # uvicorn has logged why, such as a port in use.
        raise ConfigError(f"--host {args.host} --port {args.port}: the server could not listen there") from error
    except KeyboardInterrupt:
        pass
