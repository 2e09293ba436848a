"""The sources of training data of a config, each as a config of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from internlm.config.schema import BlendEntryConfig, Config
from internlm.data.sources.blend_members import source_seed


@dataclass(frozen=True)
class TrainSource:
    """One source of training data.

    Attributes:
        key: of its folder in the config.
        config: of a run on this source alone, with its folder in `data.train_folder`; None: dummy data.
    """

    key: str
    config: Config


def train_sources(config: Config) -> list[TrainSource]:
    """All sources of training data: those of `data.blend`, or that of `data.train_folder`."""
    if not config.data.blend:
        return [TrainSource("data.train_folder", config)]
    return [
        TrainSource(f"{key}.path", config_of(config, entry)) for key, entry in _walk(config.data.blend, "data.blend")
    ]


def config_of(config: Config, entry: BlendEntryConfig) -> Config:
    """The config of a run on one source of a blend, with a seed of its own."""
    assert entry.name is not None
    data = entry.applied_to(config.data)
    data = data.model_copy(update={"seed": source_seed(config.data.seed, entry.name)})
    return config.model_copy(update={"data": data})


def _walk(entries: Sequence[BlendEntryConfig], key: str) -> Iterator[tuple[str, BlendEntryConfig]]:
    for number, entry in enumerate(entries):
        if entry.blend:
            yield from _walk(entry.blend, f"{key}[{number}].blend")
        else:
            yield f"{key}[{number}]", entry
