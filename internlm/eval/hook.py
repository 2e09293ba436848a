"""Decides when to evaluate. The trainer runs the evaluation; `internlm.core.token_statistics` computes the results."""

from __future__ import annotations

from internlm.core.hooks import Hook, RunningTrainer


class EvaluationHook(Hook):
    """Evaluates every `every` steps and after the last step of the run.

    A stop request does not trigger an evaluation: the process may be about to be killed, and a resumed run evaluates at
    its end. Place the hook after the checkpoint hook, so that a failing or hanging evaluation loses no training.

    Args:
        every: steps between two evaluations; 0 disables them.
        at_start: also evaluate before the first step of the run, the weights that were loaded or initialized.
    """

    name = "evaluation"

    def __init__(self, every: int, *, at_start: bool = False) -> None:
        self.every = every
        self.at_start = at_start

    def on_step_start(self, trainer: RunningTrainer) -> None:
        if self.at_start and trainer.state.step == 0:
            trainer.evaluate()

    def on_step_counted(self, trainer: RunningTrainer) -> None:
        step = trainer.state.step
        if self.every > 0 and (step % self.every == 0 or step == trainer.total_steps):
            trainer.evaluate()
