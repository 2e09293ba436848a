"""Ends a run that no longer learns: no update, or nothing to learn from.

Owns the counts in a row and the words. Looks at the numbers of a step when the next one is queued, so that no step
waits; they are the same on all ranks, which therefore end at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.step_metrics import StepMetrics
from internlm.monitor.step_numbers import HeldStep, StepNumbers
from internlm.utils.errors import TrainingError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

_WAYS_OUT = (
    "Go on from a checkpoint before that, with a lower adam.lr or without the batches that cause it (data.skip_batches)"
)


class HealthHook(Hook):
    """Raises TrainingError on all ranks after too many skipped updates in a row, when an epoch has no label, and at the
    end of a run that had no update or no label at all.

    A step that overflows while its loss scale can still fall is no failure: dynamic scaling begins so. It neither
    counts nor ends a row, unless its loss itself is not finite.

    Place it last, so that what other hooks do at the end of the loop is done before it raises there.

    Args:
        numbers: shared with the sinks.
        max_skipped: updates skipped in a row that end the run; 0 never ends it.
        smallest_scale: the loss scale that falls no further.
        find_cause: tells what is not finite; called on all ranks.
        samples_per_epoch: None where the data has no epochs.
        why_no_label: likely reasons why no token has a label.
    """

    name = "health"

    def __init__(
        self,
        numbers: StepNumbers,
        *,
        max_skipped: int,
        smallest_scale: float,
        find_cause: Callable[[], str],
        samples_per_epoch: int | None,
        why_no_label: str,
    ) -> None:
        self._held = HeldStep(numbers)
        self.max_skipped = max_skipped
        self.smallest_scale = smallest_scale
        self.find_cause = find_cause
        self.samples_per_epoch = samples_per_epoch
        self.why_no_label = why_no_label

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        self._skipped = 0
        self._has_updated = False
        self._is_told = False
        self._has_labels: bool | None = None
        self._labels_until = trainer.state.num_consumed_samples

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        self._look(trainer)
        self._held.hold(metrics)

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        self._look(trainer)
        if trainer.stop_reason is not None:
            return
        if self._has_labels is False:
            raise TrainingError(
                f"no step of this run had a token with a label: it learned nothing. {self.why_no_label}"
            )
        if self._skipped and self.max_skipped and not self._has_updated:
            raise TrainingError(f"every update of this run was skipped: {self.find_cause()}. {_WAYS_OUT}")
        if self._skipped > 1 and trainer.is_main_rank:
            logger.warning(
                "the last %d updates of the run were skipped for inf or NaN gradients: the weights are older than that",
                self._skipped,
            )

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        self._held.drop_unless_it_arrives(0.0)

    def _look(self, trainer: RunningTrainer) -> None:
        numbers = self._held.take()
        if numbers is not None:
            self._look_at_labels(trainer, numbers)
            self._look_at_update(numbers)

    def _look_at_labels(self, trainer: RunningTrainer, numbers: Mapping[str, float | str]) -> None:
        step, consumed = int(numbers["step"]), int(numbers["num_consumed_samples"])
        if float(numbers["valid_tokens"]) > 0:
            self._has_labels = True
            self._labels_until = consumed
            return
        self._has_labels = self._has_labels or False
        if not self._is_told and trainer.is_main_rank:
            logger.warning("step %d: no token of the global batch has a label. %s", step, self.why_no_label)
        self._is_told = True
        if self.samples_per_epoch is not None and consumed - self._labels_until >= self.samples_per_epoch:
            raise TrainingError(
                f"step {step}: no token of the last {consumed - self._labels_until} samples had a label, which is an "
                f"epoch ({self.samples_per_epoch} samples) and more: there is nothing to learn. {self.why_no_label}"
            )

    def _look_at_update(self, numbers: Mapping[str, float | str]) -> None:
        if not numbers["skipped"]:
            self._skipped = 0
            self._has_updated = True
            return
        may_recover = float(numbers["loss_scale"]) > self.smallest_scale
        if may_recover and math.isfinite(float(numbers.get("loss", 0.0))):
            return
        self._skipped += 1
        if self._skipped == self.max_skipped:
            raise TrainingError(
                f"step {numbers['step']}: {self._skipped} updates in a row were skipped for inf or NaN gradients "
                f"(monitor.max_skipped_updates): {self.find_cause()}. {_WAYS_OUT}"
            )
