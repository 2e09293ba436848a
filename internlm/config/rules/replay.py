"""Rules on the replay of routing."""

from __future__ import annotations

from collections.abc import Iterator

from internlm.config.problem import Problem
from internlm.config.schema import Config


def routing(config: Config, world_size: int) -> Iterator[Problem]:
    """Routing of a mixture of experts is either written or read, in a local folder."""
    replay = config.moe.replay
    folders = {"moe.replay.write": replay.write, "moe.replay.read": replay.read}
    given = {key: folder for key, folder in folders.items() if folder is not None}
    for key, folder in given.items():
        if config.model.num_experts <= 1:
            yield Problem(
                (key, "model.num_experts"),
                f"{key} = {folder!r}: the model is dense (model.num_experts = {config.model.num_experts}) and has no "
                "routing; remove the key",
            )
        if "://" in folder.removeprefix("local:"):
            yield Problem((key,), f"{key} = {folder!r}: routing is replayed in local folders; give a path on a disk")
    if len(given) == 2:
        yield Problem(
            ("moe.replay.write", "moe.replay.read"),
            "moe.replay.write and moe.replay.read are both set: a run writes what it chooses, or reads; remove one",
        )
