"""A trainer without a model, to drive hooks through a loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from internlm.core.hooks import Hook, SaveResult, TrainState
from internlm.core.step_metrics import StepMetrics


def step_metrics(step: int, **fields) -> StepMetrics:
    """A step of 1,000 tokens, 900 of them valid, in half a second; `fields` replace what they name."""
    values = {
        "step": step,
        "loss": torch.tensor(10.0 / step),
        "grad_norm": torch.tensor(1.25),
        "skipped": torch.tensor(0.0),
        "hyper_parameters": {"lr": 1e-3, "beta2": 0.95},
        "loss_scale": torch.tensor(1.0),
        "num_valid_tokens": torch.tensor(900),
        "num_tokens": 1000,
        "num_documents": 4,
        "micro_num": 2,
        "largest_length": 250,
        "largest_batch": 3,
        "smallest_batch": 2,
        "num_consumed_tokens": 1000 * step,
        "num_consumed_samples": 4 * step,
        "inf_nan_skip_batches": torch.tensor(0.0),
        "seconds": {"total": 0.5, "data": 0.01, "forward_backward": 0.4, "optimizer": 0.05},
    }
    return StepMetrics(**{**values, **fields})


class FakeTrainer:
    """Fulfils `RunningTrainer`; `fit` calls the hooks as the real loop does."""

    def __init__(
        self,
        run_dir: Path,
        hooks: Sequence[Hook],
        total_steps: int = 4,
        start: int = 0,
        is_main_rank: bool = True,
        metrics: Callable[[int], StepMetrics] = step_metrics,
    ) -> None:
        self.run_dir = run_dir
        self.hooks = hooks
        self.total_steps = total_steps
        self.state = TrainState(step=start)
        self.is_main_rank = is_main_rank
        self.metrics = metrics
        self.evaluated_at: list[int] = []
        self.stop_reason: str | None = None
        self.save_reason: str | None = None
        self.asked_at: list[int] = []
        self.resumed_from: str | None = None

    def evaluate(self) -> dict[str, float]:
        self.evaluated_at.append(self.state.step)
        results = {"val/books_loss": 2.5, "val/books_acc": 0.5, "val/books_plex": 12.18}
        for hook in self.hooks:
            hook.on_evaluation_end(self, results)
        return results

    def save_checkpoint(self, *, snapshot: bool = False) -> None:
        for hook in self.hooks:
            hook.on_save_start(self)

    def poll_saves(self) -> list[SaveResult]:
        return []

    def finish_saving(self) -> None:
        """Nothing is ever under way."""

    def drain_saves(self, seconds: float) -> None:
        """Nothing is ever under way."""

    def request_stop(self, reason: str) -> None:
        self.stop_reason = reason

    def request_save(self, reason: str) -> None:
        self.save_reason = reason

    def request_at(self, step: int) -> None:
        self.asked_at.append(step)

    def fit(self, fail_at: int | None = None) -> None:
        """Run to `total_steps`, to a stop request, or raise RuntimeError in the step `fail_at`."""
        for hook in self.hooks:
            hook.on_fit_start(self)
        try:
            while self.state.step < self.total_steps and self.stop_reason is None:
                for hook in self.hooks:
                    hook.on_step_start(self)
                if self.state.step + 1 == fail_at:
                    raise RuntimeError("failed on purpose")
                self.state.step += 1
                metrics = self.metrics(self.state.step)
                for hook in self.hooks:
                    hook.on_step_end(self, metrics)
                for hook in self.hooks:
                    hook.on_step_counted(self)
        except RuntimeError as error:
            for hook in self.hooks:
                hook.on_exception(self, error)
            raise
        for hook in self.hooks:
            hook.on_fit_end(self)
