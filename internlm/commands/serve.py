"""`internlm serve`: an OpenAI-compatible server for a trained model."""

from __future__ import annotations

import argparse
import math
import os

from internlm.apis.generation import DEFAULT_ROWS
from internlm.commands.model_options import add_model_options, load_model
from internlm.serve.engine_thread import EngineThread
from internlm.serve.language_model import LanguageModel
from internlm.utils.errors import ConfigError, DataError
from internlm.utils.logging import configure_logging, get_logger
from internlm.utils.paths import local_path

logger = get_logger(__name__)

KEY_VARIABLE = "INTERNLM_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes a free one (default: 8000)")
    parser.add_argument("--name", metavar="TEXT", help="of the model in requests (default: the JOB_NAME of the run)")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a prompt and its continuation together (default: data.seq_len of the run)",
    )
    parser.add_argument(
        "--batch", type=int, default=DEFAULT_ROWS, metavar="N", help=f"texts at a time (default: {DEFAULT_ROWS})"
    )
    parser.add_argument(
        "--max-waiting", type=int, default=64, metavar="N", help="texts that may wait; more are refused (default: 64)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds that a request may take (default: 600)"
    )
    parser.add_argument(
        "--api-key-file",
        type=local_path,
        metavar="FILE",
        help=f"file with the key that requests must have (default: the environment variable {KEY_VARIABLE}, if set)",
    )
    parser.add_argument(
        "--chat-template", type=local_path, metavar="FILE", help="Jinja template (default: that of the tokenizer)"
    )
    parser.add_argument(
        "--bos",
        action="store_true",
        help="prepend the beginning-of-text token, for models whose training documents begin with it",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted; returns the exit code."""
    configure_logging()
    try:
        import uvicorn

        from internlm.serve.app import create_app
        from internlm.serve.served_model import ServerSettings
    except ImportError as error:
        raise ConfigError(f"the server needs {error.name}: pip install 'internlm[serve]'") from error
    _check(args)
    key = _api_key(args)
    if key is None and args.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("--host %s: whoever reaches this machine can use the model; set %s", args.host, KEY_VARIABLE)
    language = load_model(args)
    if args.bos and language.tokenizer.bos_id is None:
        raise ConfigError("--bos: this tokenizer has no beginning-of-text token")
    max_length = args.max_length or language.config.data.seq_len
    try:
        template = language.chat_template(args.chat_template)
    except DataError as error:
        if args.chat_template is not None:
            raise
        template = None
        logger.info("no /v1/chat/completions: %s", error)
    engine = EngineThread(language, max_length=max_length, num_rows=args.batch, max_waiting=args.max_waiting)
    settings = ServerSettings(
        name=args.name or language.config.JOB_NAME,
        template=template,
        with_bos=args.bos,
        api_key=key,
        seconds=args.timeout,
    )
    config = uvicorn.Config(
        create_app(engine, settings), host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=5
    )
    try:
        listening = config.bind_socket()
        listening.listen(config.backlog)
        _announce(language, settings.name, engine, args, listening.getsockname()[1])
        uvicorn.Server(config).run(sockets=[listening])
    except SystemExit as error:
        # uvicorn has logged why, such as a port in use.
        raise ConfigError(f"--host {args.host} --port {args.port}: the server could not listen there") from error
    except KeyboardInterrupt:
        pass
    finally:
        engine.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    rules = {
        f"--port {args.port}: must be from 0 to 65535": 0 <= args.port <= 65535,
        f"--batch {args.batch}: must be at least 1": args.batch >= 1,
        f"--max-waiting {args.max_waiting}: must be at least 0": args.max_waiting >= 0,
        f"--max-length {args.max_length}: must be at least 2, a token of the prompt and a new one": (
            args.max_length is None or args.max_length >= 2
        ),
        f"--timeout {args.timeout}: must be a number of seconds above 0": 0 < args.timeout < math.inf,
    }
    problems = [text for text, holds in rules.items() if not holds]
    if problems:
        raise ConfigError(problems)


def _announce(language: LanguageModel, name: str, engine: EngineThread, args: argparse.Namespace, port: int) -> None:
    logger.info(
        "%s from %s on %s: %d texts of up to %d tokens at a time; http://%s:%d/v1",
        name, language.checkpoint, language.device, args.batch, engine.max_length, args.host, port,
    )  # fmt: skip


def _api_key(args: argparse.Namespace) -> str | None:
    if args.api_key_file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = args.api_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {args.api_key_file}: cannot be read: {error}") from error
    if not key:
        raise ConfigError(f"--api-key-file {args.api_key_file}: is empty")
    return key
