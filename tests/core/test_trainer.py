"""The loop: counters, hooks, stopping, and two runs in one process."""

from __future__ import annotations

import datetime
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import RankFailedError, RankPool
from helpers.runs import Record, assert_same_bits, new_trainer, steps_in, train
from helpers.tiny import micro_batch

import internlm.core.trainer as trainer_module
from internlm.core.hooks import Hook
from internlm.data.batch import Batch
from internlm.eval.hook import EvaluationHook
from internlm.model.ops.attention.causal_attention import VarlenMetadata


class Events(Hook):
    """Notes every call."""

    name = "events"

    def __init__(self) -> None:
        self.log: list[str] = []

    def on_fit_start(self, trainer: Any) -> None:
        self.log.append("start")

    def on_step_start(self, trainer: Any) -> None:
        self.log.append("step")

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        self.log.append(f"end {metrics.step}")

    def on_checkpoint_saved(self, trainer: Any, path: Path) -> None:
        self.log.append(f"saved {path.name}")

    def on_exception(self, trainer: Any, error: BaseException) -> None:
        self.log.append(f"error {error}")

    def on_fit_end(self, trainer: Any) -> None:
        self.log.append("done")


def test_hooks_are_called_in_order_and_counters_count(tmp_path: Path) -> None:
    events = Events()
    trainer = new_trainer(tmp_path, 3, every=2, hooks=[events])
    state = trainer.fit()
    assert events.log == [
        "start", "step", "end 1", "step", "end 2", "saved 2", "step", "end 3", "saved 3", "done",
    ]  # fmt: skip
    assert (state.step, state.num_consumed_samples, state.num_consumed_tokens) == (3, 12, 3 * 4 * 20)


def test_the_main_rank_alone_hears_of_complete_checkpoints(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    assert ranks(2).run(saves_heard_of, str(tmp_path)) == [["saved 2", "saved 3"], []]


def saves_heard_of(folder: str) -> list[str]:
    events = Events()
    new_trainer(folder, 3, every=2, hooks=[events]).fit()
    return [event for event in events.log if event.startswith("saved")]


class SendSignal(Hook):
    """Sends a signal to this process after a step."""

    name = "send"

    def __init__(self, number: signal.Signals, step: int, rank: int = 0) -> None:
        self.number, self.step, self.rank = number, step, rank

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        if metrics.step == self.step and trainer.context.rank == self.rank:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    trainer = new_trainer(tmp_path, 100, every=50, hooks=[SendSignal(number, 3)])
    state = trainer.fit()
    assert state.step == 3
    assert steps_in(tmp_path) == [3]
    assert trainer.stop_reason == f"received {number.name}"
    assert signal.getsignal(number) is before


def test_a_signal_on_one_rank_stops_all_at_the_same_step(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    steps = ranks(2).run(stop_on_rank_one, str(tmp_path))
    assert steps[0] == steps[1]
    assert 3 <= steps[0] <= 5
    assert steps_in(tmp_path) == [steps[0]]


def stop_on_rank_one(folder: str) -> int:
    return new_trainer(folder, 100, every=50, hooks=[SendSignal(signal.SIGTERM, 3, rank=1)]).fit().step


def test_a_request_to_save_is_answered_where_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(trainer_module.logger, "warning", lambda text, *values: told.append(text % values))
    assert new_trainer(None, 4, hooks=[SendSignal(signal.SIGUSR2, 2)]).fit().step == 4
    assert told == ["step 2: received SIGUSR2, but this run saves nothing"]


def test_skipped_batches_are_counted_but_not_trained(tmp_path: Path) -> None:
    record = Record()
    trainer = new_trainer(None, 4, hooks=[record])
    trainer.is_skipped = lambda step: step == 1
    state = trainer.fit()
    everything = train(None, 4)
    assert len(record.losses) == 3
    assert record.losses[0] == everything["losses"][0]
    assert (state.step, state.num_consumed_samples) == (4, 16)


class Evaluations(Hook):
    """Keeps the step and the loss of every evaluation."""

    name = "evaluations"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []

    def on_evaluation_end(self, trainer: Any, results: dict[str, float]) -> None:
        self.steps.append(trainer.state.step)
        self.losses.append(results["val/books_loss"])


def run_with_skips(folder: Path, skipped: set[int], resume_from: int | None = None) -> tuple[Record, Evaluations]:
    """Six steps, evaluated after each and saved after every second; the steps of `skipped` (from 1) are passed over."""
    record, evaluations = Record(), Evaluations()
    trainer = new_trainer(folder, 6, every=2, hooks=[record, EvaluationHook(1), evaluations])
    trainer.valid_sets = {"books": [Batch([micro_batch(50)], num_samples=1)]}
    trainer.is_skipped = lambda step: step + 1 in skipped
    if resume_from is not None:
        trainer.checkpointer.load(trainer, folder / str(resume_from))  # type: ignore[union-attr]
    trainer.fit()
    return record, evaluations


def test_what_is_due_at_a_skipped_step_is_done(tmp_path: Path) -> None:
    whole, evaluations = run_with_skips(tmp_path, {4, 6})
    assert steps_in(tmp_path) == [2, 4, 6]
    assert evaluations.steps == [1, 2, 3, 4, 5, 6]
    # A step without training leaves the weights as they were.
    assert evaluations.losses[3] == evaluations.losses[2] and evaluations.losses[5] == evaluations.losses[4]
    assert len(set(evaluations.losses)) == 4
    resumed, _ = run_with_skips(tmp_path, {4, 6}, resume_from=4)
    assert resumed.losses == whole.losses[3:]
    assert len(resumed.losses) == 1


def test_the_weights_of_the_last_update_are_there_after_fit(ranks: Callable[[int], RankPool]) -> None:
    assert ranks(2).run(gathers_pending_after_fit) == [0, 0]


def gathers_pending_after_fit() -> int:
    trainer = new_trainer(None, 2)
    optimizer: Any = trainer.engine.optimizer
    optimizer.overlap_sync_param = True
    trainer.fit()
    return sum(bucket._gathering is not None for bucket in optimizer.buckets)


def test_an_exception_reaches_hooks_and_the_caller() -> None:
    class Breaks(Hook):
        name = "breaks"

        def on_step_end(self, trainer: Any, metrics: Any) -> None:
            raise RuntimeError("broken hook")

    events = Events()
    trainer = new_trainer(None, 4, hooks=[events, Breaks()])
    with pytest.raises(RuntimeError, match="broken hook"):
        trainer.fit()
    assert events.log == ["start", "step", "end 1", "error broken hook"]
    assert str(trainer.progress) == "breaks: on_step_end, step 1"


def test_two_runs_in_one_process_do_not_touch_each_other() -> None:
    alone = train(None, 3)
    first, second = new_trainer(None, 3), new_trainer(None, 2, dtype="torch.bfloat16", num_layers=1)
    second.fit()
    first.fit()
    assert_same_bits({n: p.detach() for n, p in first.engine.model.named_parameters()}, alone["weights"])


def test_evaluation_is_the_mean_over_all_tokens_of_a_set() -> None:
    trainer = new_trainer(None, 1)
    micros = [micro_batch(5, masked=0.1), micro_batch(6, (20,), masked=0.6)]
    trainer.valid_sets = {"books": [Batch(micros, num_samples=2)]}
    results = trainer.evaluate()
    model = trainer.engine.model
    losses, hits = [], []
    with torch.no_grad():
        for micro in micros:
            hidden = model(micro.input_ids, micro.position_ids, VarlenMetadata.of(micro.lengths))  # type: ignore[arg-type]
            logits = model.logits(hidden)[0]  # type: ignore[operator]
            valid = micro.labels[0] >= 0
            losses.append(torch.nn.functional.cross_entropy(logits, micro.labels[0], reduction="none")[valid])
            hits.append((logits.argmax(-1) == micro.labels[0])[valid])
    loss = torch.cat(losses).mean().item()
    assert results["val/books_loss"] == pytest.approx(loss, rel=1e-6)
    assert results["val/books_acc"] == pytest.approx(torch.cat(hits).float().mean().item(), rel=1e-6)
    assert results["val/books_plex"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-5)


class Finite:
    """A source that ends; notes that it was closed."""

    def __init__(self, source: Any, count: int) -> None:
        self.source, self.count, self.closed = source, count, 0

    def seek(self, step: int, num_consumed_samples: int) -> None:
        self.source.seek(step, num_consumed_samples)

    def __iter__(self) -> Iterator[Batch]:
        return itertools.islice(iter(self.source), self.count)

    def close(self) -> None:
        self.closed += 1


def until_the_data_ends(folder: str, counts: list[int]) -> tuple[int, list[int], int]:
    """Step reached, checkpoints, and how often the source was closed; rank r has `counts[r]` batches."""
    trainer_module.END_OF_DATA_TIMEOUT = datetime.timedelta(seconds=1)
    trainer = new_trainer(folder, 10, every=100)
    source = trainer.train_loader = Finite(trainer.train_loader, counts[trainer.context.rank])
    state = trainer.fit()
    return state.step, steps_in(Path(folder)), source.closed


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_without_more_data_saves_and_ends(
    tmp_path: Path, ranks: Callable[[int], RankPool], monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.setattr(trainer_module, "END_OF_DATA_TIMEOUT", trainer_module.END_OF_DATA_TIMEOUT)
    run = ranks(2).run if world == 2 else lambda function, *args: [function(*args)]
    assert run(until_the_data_ends, str(tmp_path), [4, 4]) == [(4, [4], 1)] * world


def test_data_that_ends_on_one_rank_alone_is_an_error(tmp_path: Path, ranks: Callable[[int], RankPool]) -> None:
    with pytest.raises(RankFailedError, match="data of rank 1 ended at step 3 of 10, but that of another rank did not"):
        ranks(2).run(until_the_data_ends, str(tmp_path), [4, 3])


def test_a_stopped_trainer_may_go_on() -> None:
    """In a notebook, after Ctrl-C."""
    record = Record()
    trainer = new_trainer(None, 6, hooks=[record, SendSignal(signal.SIGINT, 2)])
    assert trainer.fit().step == 2
    assert trainer.fit().step == 6
    assert record.losses == train(None, 6)["losses"]
