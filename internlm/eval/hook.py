"""Decides when to evaluate. The trainer runs the evaluation; `internlm.core.token_statistics` computes the results."""

from __future__ import annotations

from internlm.core.hooks import Hook, RunningTrainer


class EvaluationHook(Hook):
    """Evaluates every `every` steps and after the last step of the run.

    A stop request does not trigger an evaluation: the process may be about to be killed, and a resumed run evaluates at
    its end. Place the hook after the checkpoint hook, so that a failing or hanging evaluation loses no training.

    Args:
        every: steps between two evaluations; 0 disables them.
    """

    name = "evaluation"

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_counted(self, trainer: RunningTrainer) -> None:
        step = trainer.state.step
        if self.every > 0 and (step % self.every == 0 or step == trainer.total_steps):
            trainer.evaluate()
