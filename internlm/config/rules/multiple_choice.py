"""Rules on multiple-choice questions that evaluations score."""

from __future__ import annotations

import re
from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config


def multiple_choice(config: Config, world_size: int) -> Iterator[Problem]:
    """They need a tokenizer, names that no validation set has, and a model that predicts the next token."""
    data = config.data
    if not data.multiple_choice or data.valid_every == 0:
        return
    if data.tokenizer_path is None:
        yield Problem(
            ("data.tokenizer_path", "data.multiple_choice"),
            "data.multiple_choice needs data.tokenizer_path, the tokenizer of its questions",
        )
    if config.model.is_reward:
        yield Problem(
            ("data.multiple_choice", "model.is_reward"),
            "data.multiple_choice: a reward model predicts no tokens; remove it",
        )
    for name in data.multiple_choice:
        if not re.fullmatch(r"[\w.-]+", name):
            yield Problem(
                ("data.multiple_choice",),
                f"data.multiple_choice has the name {name!r}: use letters, digits, '_', '-' and '.', as in metrics",
            )
        if isinstance(data.valid_folder, dict) and name in data.valid_folder:
            yield Problem(
                ("data.multiple_choice", "data.valid_folder"),
                f"data.multiple_choice and data.valid_folder both have the name {name!r}; rename one of them",
            )
