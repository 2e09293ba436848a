"""Tasks of lm-evaluation-harness: finds them by name, loads their data, and computes their scores.

Importing it needs the package `lm_eval`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from internlm.serve.harness import HarnessModel
from internlm.utils.errors import ConfigError, UserError, nearest
from internlm.utils.logging import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task, or of a group of tasks.

    Attributes:
        task: its name.
        version: of the task.
        num_fewshot: examples in front of each document; None for a group.
        filter: of lm-evaluation-harness, "none" if answers are taken as they are.
        metric: its name.
        value: of the metric.
        stderr: its standard error; None if it is not known.
        num_documents: that were scored.
        num_all: documents of the task, without a limit.
    """

    task: str
    version: str | float | None
    num_fewshot: int | None
    filter: str
    metric: str
    value: float
    stderr: float | None
    num_documents: int
    num_all: int


def load_tasks(names: Sequence[str], folder: Path | None = None, num_fewshot: int | None = None) -> TaskDict:
    """Load tasks, groups or tags with their data.

    Args:
        names: of files in `folder` if they are there, else of lm-evaluation-harness.
        folder: with YAML files of tasks; relative paths of their data begin there.
        num_fewshot: examples in front of each document; None: as each task says, or none.

    Raises:
        ConfigError: a file is no YAML, a name is unknown, data cannot be loaded, or a task cannot be computed.
    """
    folder = None if folder is None else folder.absolute()
    _check_files(folder)
    manager = TaskManager(include_path=folder, include_defaults=False) if folder is not None else None
    if manager is None or not all(name in manager.task_index for name in names):
        manager = TaskManager(include_path=folder)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        place = "" if folder is None else f" in {folder} and"
        raise ConfigError(
            [f"--tasks: no task '{name}'{place} in lm-evaluation-harness.{nearest(name, manager.all_tasks)}"
             for name in unknown]
        )  # fmt: skip
    loaded: list[Any] = []
    with contextlib.nullcontext() if folder is None else contextlib.chdir(folder):
        for name in names:
            try:
                loaded.append(manager.load([name]))
            except UserError:
                raise
            # Loaders of data raise errors of every kind: of files, networks, the hub, parsers.
            except Exception as error:
                raise ConfigError(_unloadable(name, error)) from error
    found: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    for each in loaded:
        found["tasks"] |= each["tasks"]
        found["groups"] |= each["groups"]
        found["group_map"] |= each["group_map"]
    _check_tasks(found["tasks"])
    for name, task in found["tasks"].items():
        _set_fewshot(name, task, num_fewshot)
    return found


def _check_files(folder: Path | None) -> None:
    if folder is None:
        return
    if not folder.is_dir():
        raise ConfigError(f"--task-files {folder}: no such folder")
    files = sorted(folder.glob("**/*.yaml"))
    if not files:
        raise ConfigError(f"--task-files {folder}: no .yaml file of a task is there")
    problems = []
    for file in files:
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), _TagsAsText)
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            problems.append(f"{file}: cannot be read: {' '.join(str(error).split())}")
            continue
        if not isinstance(content, dict):
            problems.append(f"{file}: must be the keys of a task, is {type(content).__name__}")
    if problems:
        raise ConfigError(problems)


class _TagsAsText(yaml.SafeLoader):
    """YAML in which tags such as `!function` are not looked up."""


_TagsAsText.add_multi_constructor("!", lambda loader, suffix, node: suffix)


def _unloadable(name: str, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    offline = any(word in text.lower() for word in ("offline", "connect", "resolve", "huggingface.co", "hub"))
    fix = (
        "; its data must be downloaded: do that on a machine with network, and take the folder of HF_HOME along, or "
        "name local files in dataset_kwargs.data_files"
        if offline
        else ""
    )
    return f"--tasks: task '{name}' cannot be loaded: {text}{fix}"


def _check_tasks(tasks: dict[str, Task]) -> None:
    problems = []
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            problems.append(f"task '{name}' runs code that the model writes, which `internlm eval` does not do")
        if getattr(task, "MULTIMODAL", False):
            problems.append(f"task '{name}' has pictures or sound, which `internlm eval` does not support")
    if problems:
        raise ConfigError([f"--tasks: {problem}" for problem in problems])


def _set_fewshot(name: str, task: Task, num_fewshot: int | None) -> None:
    own = task.get_config("num_fewshot")
    if num_fewshot is None:
        task.set_config(key="num_fewshot", value=own or 0)
        return
    is_rolling = task.OUTPUT_TYPE == "loglikelihood_rolling"
    if num_fewshot and (own == 0 or is_rolling):
        why = "scores whole texts" if is_rolling else "has num_fewshot: 0 in its file"
        logger.warning("--num-fewshot %d: task '%s' %s and gets no examples", num_fewshot, name, why)
        num_fewshot = 0
    elif own not in (None, num_fewshot):
        logger.info("task '%s': %d examples instead of its own number, %d", name, num_fewshot, own)
    task.set_config(key="num_fewshot", value=num_fewshot)


def score_tasks(
    model: HarnessModel,
    tasks: TaskDict,
    *,
    limit: int | None = None,
    seed: int,
    with_chat: bool = False,
    system: str | None = None,
) -> list[TaskScore]:
    """Compute the scores of tasks.

    Args:
        model: answers.
        tasks: of `load_tasks`.
        limit: only the first documents of each task; None: all.
        seed: of the choice of few-shot examples, and of whatever else a task draws.
        with_chat: prompts are conversations, rendered with the template of the model.
        system: first message of each conversation, or text in front of each prompt.

    Raises:
        ConfigError, DataError: a task asks for something that is not supported.
        NonFiniteError: the model returns inf or NaN.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=seed)
    results = evaluate(
        lm=model,
        task_dict=tasks,
        limit=limit,
        log_samples=False,
        system_instruction=system,
        apply_chat_template=with_chat,
        fewshot_as_multiturn=with_chat,
    )
    assert results is not None
    return list(_scores(results))


def _scores(results: dict[str, Any]) -> Iterable[TaskScore]:
    counts = results["n-samples"]
    for name, metrics in {**results["results"], **results.get("groups", {})}.items():
        members = _leaves(name, results.get("group_subtasks", {}))
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filter_name}")
            yield TaskScore(
                task=name,
                version=results["versions"].get(name),
                num_fewshot=results["n-shot"].get(name),
                filter=filter_name,
                metric=metric,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                num_documents=sum(counts[member]["effective"] for member in members),
                num_all=sum(counts[member]["original"] for member in members),
            )


def _leaves(name: str, subtasks: dict[str, list[str]]) -> list[str]:
    """The tasks below a group; the task itself if it is none."""
    own = subtasks.get(name) or []
    return [leaf for each in own for leaf in _leaves(each, subtasks)] or [name]
