"""The optional protocols of a source of batches are used where a source implements them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import global_batch, tiny_engine

from internlm.checkpoint.manager import CheckpointManager
from internlm.core.batch_source import BatchSource, ClosableSource, SeekableSource, StatefulSource
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.hooks import Hook
from internlm.core.trainer import Trainer
from internlm.data.batch import Batch
from internlm.data.loaders.token_list_loader import TokenListLoader
from internlm.data.loaders.train_loader import TrainLoader


class Recorded:
    """Batches; implements all protocols and records the calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.step = 0

    def __iter__(self) -> Iterator[Batch]:
        return iter([global_batch(step) for step in range(self.step, 4)])

    def seek(self, step: int, num_consumed_samples: int) -> None:
        self.calls.append(("seek", step, num_consumed_samples))
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {"files": "abc"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append(("load", state))

    def close(self) -> None:
        self.calls.append("close")


def trainer_of(source: BatchSource, total_steps: int, folder: Path) -> Trainer:
    return Trainer(
        tiny_engine(ParallelContext.create()),
        source,
        total_steps=total_steps,
        lr=lambda position: 1e-3,
        run_dir=folder / "run",
        checkpointer=CheckpointManager(folder / "checkpoints"),
    )


def test_a_source_of_all_protocols_is_positioned_compared_and_closed(tmp_path: Path) -> None:
    first = Recorded()
    trainer = trainer_of(first, 2, tmp_path)
    trainer.fit()
    assert first.calls == [("seek", 0, 0), "close"]
    trainer.save_checkpoint()
    trainer.finish_saving()

    second = Recorded()
    resumed = trainer_of(second, 3, tmp_path)
    assert CheckpointManager(tmp_path / "checkpoints").resume(resumed) is not None
    resumed.fit()
    samples = 2 * global_batch(0).num_samples
    assert second.calls == [("load", {"files": "abc"}), ("seek", 2, samples), "close"]


def test_a_source_is_closed_after_an_exception(tmp_path: Path) -> None:
    class Breaks(Hook):
        def on_step_end(self, trainer: Any, metrics: Any) -> None:
            raise RuntimeError("broken hook")

    source = Recorded()
    trainer = trainer_of(source, 2, tmp_path)
    trainer.hooks.append(Breaks())
    with pytest.raises(RuntimeError, match="broken hook"):
        trainer.fit()
    assert source.calls == [("seek", 0, 0), "close"]


def test_a_list_of_batches_is_a_source(tmp_path: Path) -> None:
    trainer = trainer_of([global_batch(step) for step in range(2)], 2, tmp_path)
    assert trainer.fit().step == 2
    trainer.save_checkpoint()
    trainer.finish_saving()


@pytest.mark.parametrize(
    ("loader", "protocols"),
    [(TrainLoader, {SeekableSource, StatefulSource, ClosableSource}), (TokenListLoader, {SeekableSource})],
)
def test_protocols_of_the_loaders(loader: type, protocols: set[type]) -> None:
    everything = (SeekableSource, StatefulSource, ClosableSource)
    assert {protocol for protocol in everything if issubclass(loader, protocol)} == protocols
