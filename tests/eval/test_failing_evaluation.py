"""An evaluation that meets bad data costs neither the steps before it nor those after it, on any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import RankPool
from helpers.runs import new_trainer, steps_in
from helpers.tiny import micro_batch

from internlm.core.hooks import Hook
from internlm.data.batch import Batch
from internlm.eval.hook import EvaluationHook
from internlm.utils.errors import DataError


class Broken:
    """A valid set of three batches; after `count` of them `error` is raised, or, if it is None, the set ends."""

    def __init__(self, count: int, error: Exception | None) -> None:
        self.count, self.error = count, error

    def __iter__(self) -> Iterator[Batch]:
        for number in range(3):
            if number == self.count:
                if self.error is None:
                    return
                raise self.error
            yield Batch([micro_batch(number)], num_samples=1)


class Seen(Hook):
    """The numbers of every evaluation, by step."""

    name = "seen"

    def __init__(self) -> None:
        self.results: dict[int, dict[str, float]] = {}

    def on_evaluation_end(self, trainer: Any, results: dict[str, float]) -> None:
        self.results[trainer.state.step] = results


def run(folder: str | None, broken_rank: int, count: int, error: Exception | None) -> tuple[dict[int, Any], list[str]]:
    """Five steps, evaluated after every second; returns what was seen and told."""
    told: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("internlm").addHandler(handler)
    seen = Seen()
    trainer = new_trainer(folder, 5, every=2)
    trainer.hooks += [EvaluationHook(2), seen]
    good = Broken(3, None)
    trainer.valid_sets = {
        "good": good,
        "bad": Broken(count, error) if trainer.context.rank == broken_rank else good,
        "also good": good,
    }
    try:
        assert trainer.fit().step == 5
    finally:
        logging.getLogger("internlm").removeHandler(handler)
    return seen.results, told


@pytest.mark.parametrize("error", [DataError("token 99 is outside"), OSError("the disk fails"), ValueError("a defect")])
def test_what_is_wrong_with_a_set_is_told_and_the_run_goes_on(tmp_path: Path, error: Exception) -> None:
    results, told = run(str(tmp_path), 0, 1, error)
    assert list(results) == [2, 4, 5]
    names = {f"val/{name}_{kind}" for name in ("good", "also good") for kind in ("loss", "acc", "plex")}
    assert all(set(numbers) == names for numbers in results.values())
    told = [line for line in told if "could not read a batch" not in line]
    assert len(told) == 3
    assert told[0].startswith("step 2: 'bad' was not evaluated: ") and told[0].endswith("; the run goes on")
    assert str(error) in told[0]
    assert steps_in(tmp_path) == [2, 4, 5]


@pytest.mark.parametrize(
    "count, error, cause",
    [
        (0, DataError("token 99 is outside"), "rank 1: token 99 is outside"),
        (2, ValueError("a defect"), "rank 1: ValueError: a defect"),
        (1, None, "the batches of 1 of 2 ranks ended before those of the others"),
    ],
)
def test_when_one_rank_cannot_read_all_go_on_together(
    ranks: Callable[[int], RankPool], count: int, error: Exception | None, cause: str
) -> None:
    on_ranks = ranks(2).run(run, None, 1, count, error)
    for results, told in on_ranks:
        assert all(set(numbers) >= {"val/good_loss", "val/also good_loss"} for numbers in results.values())
        assert not any("val/bad_loss" in numbers for numbers in results.values())
        assert sum(f"'bad' was not evaluated: {cause}" in line for line in told) == 3
    assert on_ranks[0][0] == on_ranks[1][0]


def test_an_exception_of_the_evaluation_leaves_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, 3, every=5)
    trainer.hooks += [EvaluationHook(5)]
    trainer.valid_sets = {"books": Broken(3, None)}
    evaluate = trainer.engine.evaluate

    def broken(*args: Any) -> None:
        evaluate(*args)
        raise RuntimeError("out of memory")

    trainer.engine.evaluate = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit()
    assert steps_in(tmp_path) == [3]
