"""`internlm serve`: an OpenAI-compatible server for trained models, with a page."""

from __future__ import annotations

import argparse
import math

from internlm.apis.generation import DEFAULT_ROWS
from internlm.commands.model_options import add_model_options, load_model
from internlm.commands.server_options import add_server_options, api_key, bind, listen
from internlm.data.conversations.chat_template import ChatTemplate
from internlm.serve.engine_thread import EngineThread
from internlm.serve.language_model import LanguageModel
from internlm.serve.run_folder import RunFolder
from internlm.utils.errors import ConfigError, DataError
from internlm.utils.logging import configure_logging, get_logger
from internlm.utils.paths import local_path, path_text

logger = get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_options(parser)
    add_server_options(parser)
    parser.add_argument("--name", metavar="TEXT", help="of the model in requests (default: the JOB_NAME of the run)")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        type=path_text,
        metavar="DIR",
        help="also serve this checkpoint, to compare the two on the page; its name in requests is the JOB_NAME of its "
        "run with the name of its folder, such as demo-200; repeatable",
    )
    parser.add_argument("--run", type=local_path, dest="run_dir", metavar="DIR", help="run whose curves the page shows")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a prompt and its continuation together (default: data.seq_len of the run; of a Hugging Face "
        "folder, max_position_embeddings)",
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
        from internlm.serve.app import create_app
        from internlm.serve.served_model import ServedModel, ServedModels, ServerSettings
    except ImportError as error:
        raise ConfigError(f"the server needs {error.name}: pip install 'internlm[serve]'") from error
    _check(args)
    settings = ServerSettings(api_key=api_key(args, "use the model"), seconds=args.timeout)
    run_folder = None if args.run_dir is None else RunFolder(args.run_dir)
    with bind(args) as taken:
        languages = _load(args)
        engines = {
            name: EngineThread(
                language,
                max_length=args.max_length or language.config.data.seq_len,
                num_rows=args.batch,
                max_waiting=args.max_waiting,
            )
            for name, language in languages.items()
        }
        try:
            models = [
                ServedModel(engine, name, _chat_template(engine.language, args), with_bos=args.bos)
                for name, engine in engines.items()
            ]
            app = create_app(ServedModels(models, settings), run_folder)
            listen(app, taken, args, lambda address: _announce(engines, args, address))
        finally:
            for engine in engines.values():
                engine.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    rules = {
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


def _load(args: argparse.Namespace) -> dict[str, LanguageModel]:
    """The models by name, that of --ckpt first."""
    languages: dict[str, LanguageModel] = {}
    for path in (args.ckpt, *args.beside):
        language = load_model(argparse.Namespace(**{**vars(args), "ckpt": path}))
        name = args.name or language.config.JOB_NAME
        if languages:
            name = f"{language.config.JOB_NAME}-{language.checkpoint.name}"
        if name in languages:
            raise ConfigError(f"--beside {path}: another model of this server is named '{name}'; leave one of them out")
        if args.bos and language.tokenizer.bos_id is None:
            raise ConfigError("--bos: this tokenizer has no beginning-of-text token")
        languages[name] = language
    return languages


def _chat_template(language: LanguageModel, args: argparse.Namespace) -> ChatTemplate | None:
    try:
        return language.chat_template(args.chat_template)
    except DataError as error:
        if args.chat_template is not None:
            raise
        logger.info("no /v1/chat/completions: %s", error)
        return None


def _announce(engines: dict[str, EngineThread], args: argparse.Namespace, address: str) -> None:
    for name, engine in engines.items():
        logger.info(
            "%s from %s on %s: %d texts of up to %d tokens at a time; %s/v1, page: %s/",
            name, engine.language.checkpoint, engine.language.device, args.batch, engine.max_length, address, address,
        )  # fmt: skip
