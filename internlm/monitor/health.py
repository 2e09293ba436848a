"""Ends a run that no longer learns, because every update is skipped or no token has a label, or whose data is bad.

Reads the numbers of a step when the next one is queued, so that no step waits for the device. They are the same on all
ranks, which therefore end at the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from internlm.core.hooks import Hook, RunningTrainer
from internlm.core.step_metrics import StepMetrics
from internlm.monitor.deferred_metrics import DeferredMetrics
from internlm.monitor.metrics_collector import MetricsCollector
from internlm.utils.errors import DataError, TrainingError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

_WAYS_OUT = (
    "Resume from an earlier checkpoint with a lower adam.lr, or without the batches that cause it (data.skip_batches)"
)


class HealthHook(Hook):
    """Raises TrainingError on all ranks when a run learns nothing, and DataError when too much data is bad.

    A run learns nothing after too many consecutive skipped updates, after an epoch without a label, and at the end of a
    run without any update or label.

    An overflow while the loss scale can still decrease is expected, because dynamic scaling starts that way. It neither
    counts nor resets the count, unless the loss itself is not finite.

    Place it last: it may raise in `on_fit_end`, and the other hooks must have finished by then.

    Args:
        collector: shared with the sinks.
        max_skipped: number of consecutive skipped updates that ends the run; 0 for no limit.
        smallest_scale: the loss scale below which dynamic scaling does not go.
        find_cause: describes which tensors are not finite; called on all ranks.
        samples_per_epoch: None if the data has no epochs.
        why_no_label: likely reasons why no token has a label, one sentence.
        max_bad_documents: number of skipped documents above which the run ends; None for no limit.
    """

    name = "health"

    def __init__(
        self,
        collector: MetricsCollector,
        *,
        max_skipped: int,
        smallest_scale: float,
        find_cause: Callable[[], str],
        samples_per_epoch: int | None,
        why_no_label: str,
        max_bad_documents: int | None = None,
    ) -> None:
        self._deferred = DeferredMetrics(collector)
        self.max_skipped = max_skipped
        self.smallest_scale = smallest_scale
        self.find_cause = find_cause
        self.samples_per_epoch = samples_per_epoch
        self.why_no_label = why_no_label
        self.max_bad_documents = max_bad_documents

    def on_fit_start(self, trainer: RunningTrainer) -> None:
        self._skipped = 0
        self._has_updated = False
        self._has_warned = False
        self._has_labels: bool | None = None
        self._labels_until = trainer.state.num_consumed_samples

    def on_step_end(self, trainer: RunningTrainer, metrics: StepMetrics) -> None:
        self._examine(trainer)
        self._deferred.defer(metrics)

    def on_fit_end(self, trainer: RunningTrainer) -> None:
        self._examine(trainer)
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
                "the last %d updates of the run were skipped for inf or NaN gradients: these steps changed no weight",
                self._skipped,
            )

    def on_exception(self, trainer: RunningTrainer, error: BaseException) -> None:
        self._deferred.discard_unless_arrived(0.0)

    def _examine(self, trainer: RunningTrainer) -> None:
        numbers = self._deferred.pop_numbers()
        if numbers is not None:
            self._check_bad_documents(numbers)
            self._check_labels(trainer, numbers)
            self._check_update(numbers)

    def _check_bad_documents(self, numbers: Mapping[str, float | str]) -> None:
        count = int(numbers.get("bad_documents", 0))
        if self.max_bad_documents is not None and count > self.max_bad_documents:
            raise DataError(
                f"step {numbers['step']}: {count:,} documents could not be read since the start of the run, over all "
                f"ranks; data.max_bad_documents = {self.max_bad_documents:,} permits no more. The logs of the ranks "
                "name them. Repair the data (`internlm data verify` lists the damage), or raise data.max_bad_documents"
            )

    def _check_labels(self, trainer: RunningTrainer, numbers: Mapping[str, float | str]) -> None:
        step, consumed = int(numbers["step"]), int(numbers["num_consumed_samples"])
        if float(numbers["valid_tokens"]) > 0:
            self._has_labels = True
            self._labels_until = consumed
            return
        self._has_labels = self._has_labels or False
        if not self._has_warned and trainer.is_main_rank:
            logger.warning("step %d: no token of the global batch has a label. %s", step, self.why_no_label)
        self._has_warned = True
        if self.samples_per_epoch is not None and consumed - self._labels_until >= self.samples_per_epoch:
            raise TrainingError(
                f"step {step}: no token of the last {consumed - self._labels_until} samples had a label, at least one "
                f"epoch ({self.samples_per_epoch} samples): there is nothing to learn. {self.why_no_label}"
            )

    def _check_update(self, numbers: Mapping[str, float | str]) -> None:
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
                f"step {numbers['step']}: {self._skipped} consecutive updates were skipped for inf or NaN gradients "
                f"(monitor.max_skipped_updates): {self.find_cause()}. {_WAYS_OUT}"
            )
