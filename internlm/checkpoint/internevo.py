"""Recognizes a checkpoint folder of InternEvo by the names of its weight files."""

from __future__ import annotations

import re

from internlm.utils.errors import CheckpointError
from internlm.utils.storage import StoragePath

RANK_FILE = re.compile(r"model_(?P<split>tp|wp)(?P<rank>\d+)_pp(?P<stage>\d+)(?P<fsdp>_dp\d+)?\.pt")
"""Weights of one tensor or weight parallel rank of one pipeline stage; with `_dp`, the shard of an FSDP rank."""

EXPERT_FILE = re.compile(r"model_moe_layer(?P<layer>\d+)_expert(?P<expert>\d+)_(?P<split>tp|wp)(?P<rank>\d+)\.pt")
"""Weights of an expert, or of all experts of an expert parallel rank."""


def is_internevo(path: StoragePath) -> bool:
    """Whether the folder contains weight files of InternEvo.

    It may also contain a `<step>.step`, as the checkpoints of this project do.
    """
    return any(RANK_FILE.fullmatch(name) for name in path.names())


def refuse_internevo(path: StoragePath) -> None:
    """Raise CheckpointError, naming the command that converts it, if `path` is a checkpoint of InternEvo."""
    if is_internevo(path):
        raise CheckpointError(
            f"'{path}' is a checkpoint of InternEvo: convert it with `internlm convert from-internevo --ckpt {path} "
            "--out DIR` and load DIR"
        )
