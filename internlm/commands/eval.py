"""`internlm eval`: scores of a trained model in tasks of lm-evaluation-harness, without a conversion."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from internlm import __version__
from internlm.apis.engine import NonFiniteError
from internlm.apis.generation import DEFAULT_ROWS
from internlm.apis.sampling import MAX_SEED
from internlm.apis.scoring import DEFAULT_TOKENS
from internlm.commands.generate_rows import output_file
from internlm.commands.model_options import add_model_options, load_model
from internlm.serve.language_model import LanguageModel
from internlm.utils.errors import CheckpointError, ConfigError
from internlm.utils.logging import configure_logging, get_logger
from internlm.utils.paths import local_path
from internlm.utils.text_table import text_table

if TYPE_CHECKING:
    from internlm.serve.harness import HarnessModel, RequestCounts
    from internlm.serve.harness_tasks import TaskScore

logger = get_logger(__name__)

DEFAULT_SEED = 1234
"""Of few-shot examples in lm-evaluation-harness."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_model_options(parser)
    parser.add_argument("--tasks", required=True, metavar="NAME,NAME", help="tasks, groups or tags, with commas")
    parser.add_argument(
        "--task-files",
        type=local_path,
        metavar="DIR",
        help="folder with YAML files of tasks; relative paths of their data begin there (default: the tasks of "
        "lm-evaluation-harness)",
    )
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in front of each document (default: as each task says)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task, for a trial")
    parser.add_argument(
        "--output", type=local_path, metavar="FILE", help="write the scores as JSON here; not overwritten"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens that the model reads at a time (default: data.seq_len of the run)",
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help=f"tokens of a pass over texts to score (default: {DEFAULT_TOKENS})",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=DEFAULT_ROWS,
        metavar="N",
        help=f"texts that are generated at a time (default: {DEFAULT_ROWS})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_SEED,
        metavar="S",
        help=f"seed of few-shot examples and of sampled texts (default: {DEFAULT_SEED})",
    )
    parser.add_argument(
        "--bos",
        action="store_true",
        help="begin contexts with the beginning-of-text token, for models whose training documents begin with it",
    )
    parser.add_argument(
        "--chat", action="store_true", help="render prompts as conversations, with the chat template of the tokenizer"
    )
    parser.add_argument("--chat-template", type=local_path, metavar="FILE", help="another template; needs --chat")
    parser.add_argument("--system", metavar="TEXT", help="first message of each conversation; needs --chat")


def run(args: argparse.Namespace) -> int:
    """Print the scores, and write them; returns the exit code."""
    configure_logging()
    names = _check(args)
    try:
        from internlm.serve.harness_tasks import load_tasks, score_tasks
    except ImportError as error:
        raise ConfigError(f"internlm eval needs {error.name}: pip install 'internlm[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    tasks = load_tasks(names, args.task_files, args.num_fewshot)
    language = load_model(args)
    model = _harness_model(language, args)
    try:
        scores = score_tasks(model, tasks, limit=args.limit, seed=args.seed, with_chat=args.chat, system=args.system)
    except NonFiniteError as error:
        raise CheckpointError(f"{args.ckpt}: {error}; {language.where_not_finite()}") from error
    print("\n".join(text_table(_rows(scores), "<<<<>>>")))
    _warn(scores, model.counts, model.max_length)
    if args.output is not None:
        with output_file(args.output) as file:
            json.dump(_record(args, language, model, scores), file, indent=2)
            file.write("\n")
    return 0


def _check(args: argparse.Namespace) -> list[str]:
    """The names of the tasks, once all options are valid."""
    names = [name.strip() for name in args.tasks.split(",")]
    problems = [
        text
        for text, holds in {
            f"--tasks {args.tasks!r}: names between commas must not be empty": all(names),
            f"--tasks {args.tasks!r}: has a name twice": len(set(names)) == len(names),
            f"--num-fewshot {args.num_fewshot}: must be at least 0": args.num_fewshot is None or args.num_fewshot >= 0,
            f"--limit {args.limit}: must be at least 1": args.limit is None or args.limit >= 1,
            f"--max-length {args.max_length}: must be at least 2": args.max_length is None or args.max_length >= 2,
            f"--batch-tokens {args.batch_tokens}: must be at least 1": args.batch_tokens >= 1,
            f"--batch {args.batch}: must be at least 1": args.batch >= 1,
            f"--seed {args.seed}: must be from 0 to {MAX_SEED // 2}": 0 <= args.seed <= MAX_SEED // 2,
            "--chat-template has no effect without --chat": args.chat or args.chat_template is None,
            "--system has no effect without --chat": args.chat or args.system is None,
        }.items()
        if not holds
    ]
    if args.output is not None and args.output.exists():
        problems.append(f"--output {args.output}: exists; give another file, or remove it")
    if args.output is not None and not args.output.absolute().parent.is_dir():
        problems.append(f"--output {args.output}: its folder does not exist")
    if problems:
        raise ConfigError(problems)
    return names


def _harness_model(language: LanguageModel, args: argparse.Namespace) -> HarnessModel:
    from internlm.serve.harness import HarnessModel

    tokenizer = language.tokenizer
    if args.bos and tokenizer.bos_id is None:
        raise ConfigError("--bos: this tokenizer has no beginning-of-text token")
    model = HarnessModel(
        language,
        max_length=args.max_length or language.config.data.seq_len,
        bos_id=tokenizer.bos_id if args.bos else None,
        tokens_at_once=args.batch_tokens,
        num_rows=args.batch,
        seed=args.seed,
        template=language.chat_template(args.chat_template) if args.chat else None,
    )
    prefix = model.prefix_token_id
    logger.info(
        "%s on %s in %s, up to %d tokens at a time; contexts begin %s; in place of an empty one: %s",
        language.checkpoint,
        language.device,
        _dtype(language),
        model.max_length,
        "with bos" if args.bos else "without bos",
        "nothing (the tokenizer has no bos or eos)" if prefix is None else repr(tokenizer.decode([prefix])),
    )
    return model


def _dtype(language: LanguageModel) -> str:
    assert isinstance(language.model, nn.Module)
    return str(next(language.model.parameters()).dtype).removeprefix("torch.")


def _rows(scores: list[TaskScore]) -> list[list[str]]:
    rows = [["task", "few-shot", "filter", "metric", "value", "stderr", "documents"]]
    for score in scores:
        rows.append(
            [
                score.task,
                "" if score.num_fewshot is None else str(score.num_fewshot),
                score.filter,
                score.metric,
                f"{score.value:.4f}",
                "" if score.stderr is None else f"{score.stderr:.4f}",
                f"{score.num_documents:,}" + (f" of {score.num_all:,}" if score.num_documents < score.num_all else ""),
            ]
        )
    return rows


def _warn(scores: list[TaskScore], counts: RequestCounts, max_length: int) -> None:
    """Say what makes the scores differ from those of whole tasks."""
    if any(score.num_documents < score.num_all for score in scores):
        logger.warning("these are scores of a part of the documents (--limit)")
    if counts.cut or counts.cut_prompts:
        logger.warning(
            "%d of %d contexts and %d of %d prompts lost their beginning, as the model reads %d tokens (--max-length)",
            counts.cut, counts.scored, counts.cut_prompts, counts.generated, max_length,
        )  # fmt: skip
    if counts.joined:
        logger.warning(
            "in %d of %d endings a token covers the border to the context; scored as lm-evaluation-harness does, with "
            "the tokens that the context has alone",
            counts.joined, counts.scored,
        )  # fmt: skip


def _record(
    args: argparse.Namespace, language: LanguageModel, model: HarnessModel, scores: list[TaskScore]
) -> dict[str, Any]:
    template = None if not args.chat else language.chat_template(args.chat_template)
    return {
        "checkpoint": str(language.checkpoint),
        "tokenizer": str(language.tokenizer_path),
        "dtype": _dtype(language),
        "max_length": model.max_length,
        "bos": args.bos,
        "prefix_token_id": model.prefix_token_id,
        "chat_template": None if template is None else template.fingerprint,
        "system": args.system,
        "task_files": None if args.task_files is None else str(Path(args.task_files).absolute()),
        "limit": args.limit,
        "seed": args.seed,
        "requests": asdict(model.counts),
        "versions": {
            "internlm": __version__,
            "lm_eval": version("lm_eval"),
            "torch": torch.__version__,
        },
        "scores": [asdict(score) for score in scores],
    }
