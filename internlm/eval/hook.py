"""When to evaluate. What an evaluation is belongs to the trainer and `internlm.core.token_statistics`."""

from __future__ import annotations

from internlm.core.hooks import Hook, RunningTrainer


class EvaluationHook(Hook):
    """Evaluates every `every` steps and after the last step of the run; 0 never evaluates.

    A run that is asked to stop earlier is not evaluated: it may be about to be killed, and goes on later.
    Place it behind the checkpoint hook: an evaluation that fails, hangs or is killed then costs no training.
    """

    name = "evaluation"

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_counted(self, trainer: RunningTrainer) -> None:
        step = trainer.state.step
        if self.every > 0 and (step % self.every == 0 or step == trainer.total_steps):
            trainer.evaluate()
