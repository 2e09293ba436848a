"""The options of commands that listen for requests: where, and which key requests must have."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import socket
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


def api_key(args: argparse.Namespace, what: str) -> str | None:
    """The key that requests must have; None if there is none, with a warning where others can reach the server.

    Args:
        args: parsed options.
        what: whoever reaches the server without a key can do.

    Raises:
        ConfigError: the key cannot be read, is empty, or is no value of a header.
    """
    key = os.environ.get(KEY_VARIABLE)
    where = KEY_VARIABLE
    if args.api_key_file is not None:
        where = f"--api-key-file {args.api_key_file}"
        try:
            key = args.api_key_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot be read: {error}") from error
    if key is None:
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            logger.warning("--host %s: whoever reaches this machine can %s; set %s", args.host, what, KEY_VARIABLE)
        return None
    key = key.strip()
    if not key:
        remedy = f"; write a key into it, or remove it with: unset {KEY_VARIABLE}" if where == KEY_VARIABLE else ""
        raise ConfigError(f"{where}: is empty{remedy}")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{where}: a key is one line of ASCII characters, as it is sent in a header")
    return key


def bind(args: argparse.Namespace) -> socket.socket:
    """Take the address and port of `add_server_options`, before anything is loaded.

    Raises:
        ConfigError: they are invalid, or not to be had.
    """
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: must be from 0 to 65535")
    if not args.host:
        raise ConfigError("--host: must not be empty; 0.0.0.0 listens at all addresses of this machine")
    taken = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((args.host, args.port))
    except (OSError, UnicodeError) as error:
        taken.close()
        raise _cannot_listen(args, error) from error
    return taken


def listen(app: Any, taken: socket.socket, args: argparse.Namespace, announce: Callable[[str], None]) -> None:
    """Serve an application until Ctrl-C; needs uvicorn.

    Args:
        app: an ASGI application.
        taken: of `bind`.
        args: parsed options.
        announce: called with the address once the server listens.

    Raises:
        ConfigError: the server cannot listen there.
    """
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    try:
        taken.listen(config.backlog)
    except OSError as error:
        raise _cannot_listen(args, error) from error
    host = f"[{args.host}]" if ":" in args.host else args.host
    announce(f"http://{host}:{taken.getsockname()[1]}")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[taken])


def _cannot_listen(args: argparse.Namespace, error: OSError | UnicodeError) -> ConfigError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        reason = "another program listens there; give another --port, or 0 for a free one"
    elif number == errno.EACCES:
        reason = "permission denied; give a --port from 1024 on, or 0 for a free one"
    else:
        detail = getattr(error, "strerror", None) or error
        reason = f"{detail}; --host must be an address or a name of this machine, or 0.0.0.0 for all its addresses"
    return ConfigError(f"--host {args.host} --port {args.port}: the server cannot listen there: {reason}")
