"""Rules on texts that are generated while a run goes on."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config


def sample_texts(config: Config, world_size: int) -> Iterator[Problem]:
    """They need prompts, a tokenizer, and a model that predicts the next token."""
    data = config.data
    if data.generate_every == 0:
        return
    given = f"data.generate_every = {data.generate_every}"
    if not data.generate_prompts:
        yield Problem(
            ("data.generate_prompts", "data.generate_every"), f"{given} needs data.generate_prompts, a list of texts"
        )
    if data.tokenizer_path is None:
        yield Problem(
            ("data.tokenizer_path", "data.generate_every"),
            f"{given} needs data.tokenizer_path, the tokenizer of data.generate_prompts",
        )
    if config.model.is_reward:
        yield Problem(
            ("data.generate_every", "model.is_reward"), f"{given}: a reward model predicts no tokens; remove it"
        )
