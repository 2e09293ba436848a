"""When evaluations happen."""

from __future__ import annotations

import pytest
from helpers.fake_trainer import FakeTrainer

from internlm.core.hooks import Hook
from internlm.eval.hook import EvaluationHook


@pytest.mark.parametrize("every, total, steps", [(0, 4, []), (2, 4, [2, 4]), (3, 7, [3, 6, 7]), (9, 4, [4])])
def test_every_nth_step_and_the_last(tmp_path, every, total, steps):
    trainer = FakeTrainer(tmp_path, [EvaluationHook(every)], total)
    trainer.fit()
    assert trainer.evaluated_at == steps


@pytest.mark.parametrize("start, steps", [(0, [0, 2, 4]), (2, [4])])
def test_a_run_may_evaluate_what_it_starts_from(tmp_path, start, steps):
    """A resumed run evaluated its weights when it had trained them."""
    trainer = FakeTrainer(tmp_path, [EvaluationHook(2, at_start=True)], 4, start=start)
    trainer.fit()
    assert trainer.evaluated_at == steps


class StopAt(Hook):
    def on_step_end(self, trainer, metrics):
        if metrics.step == 3:
            trainer.request_stop("SIGTERM")


def test_a_run_asked_to_stop_does_not_stay_to_evaluate(tmp_path):
    trainer = FakeTrainer(tmp_path, [StopAt(), EvaluationHook(2)], 8)
    trainer.fit()
    assert trainer.evaluated_at == [2]
