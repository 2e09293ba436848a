"""Reports comparisons as text: a table of one layout's steps, and a table of many layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from internlm.verify.case import Case, Combination
from internlm.verify.compare import RunDifference, StepComparison, compare, summarize, tolerance_of
from internlm.verify.record import Record

SHOWN_DIFFERENCES = 4


@dataclass(frozen=True)
class Verdict:
    """Result of comparing one layout with one process.

    Attributes:
        steps: largest differences of each step.
        differences: differences that rounding does not explain, in order of steps.
        failure: why there was nothing to compare; empty otherwise.
    """

    steps: Sequence[StepComparison] = field(default_factory=tuple)
    differences: Sequence[RunDifference] = field(default_factory=tuple)
    failure: str = ""

    @property
    def is_equal(self) -> bool:
        """Whether the layout trains as one process does."""
        return not self.failure and not self.differences

    def explain(self) -> str:
        """Why the layout is not equal; empty if it is."""
        if self.failure:
            return self.failure
        lines = [str(difference) for difference in self.differences[:SHOWN_DIFFERENCES]]
        more = len(self.differences) - len(lines)
        return "\n".join([*lines, f"and {more} more differences"] if more > 0 else lines)


def judge(case: Case, record: Record, reference: Record) -> Verdict:
    """Compare a case's record with that of `case.reference()`."""
    tolerance = tolerance_of(case)
    return Verdict(summarize(record, reference, tolerance), compare(record, reference, tolerance))


def steps_table(verdict: Verdict) -> str:
    """The steps of one layout, as aligned text."""
    header = "step          loss   one process      norm  gradients   weights  of allowed"
    rows = [
        f"{row.step:>4}  {row.loss:>12.7f}  {row.reference_loss:>12.7f}  {row.grad_norm:>8.1e}  {row.gradient:>9.1e}  "
        f"{row.weight:>8.1e}  {row.within:>10.1%}"
        for row in verdict.steps
    ]
    return "\n".join([header, *rows])


def matrix_table(rows: Sequence[tuple[Combination, Verdict]]) -> str:
    """All combinations of a matrix as a Markdown table."""
    equal = sum(verdict.is_equal for _, verdict in rows)
    lines = [
        f"{equal} of {len(rows)} combinations train as one process does.",
        "",
        "Largest relative differences to one process, over all steps. `of allowed`: the largest one as a share of what",
        "rounding explains.",
        "",
        "| ranks | layout, model, batch, optimizer | loss | gradients | weights | of allowed | result |",
        "|---|---|---|---|---|---|---|",
    ]
    for combination, verdict in rows:
        ranks, *words = str(combination).split()
        cells = [ranks.removeprefix("ranks="), "<br>".join(words) or "all defaults"]
        if verdict.steps:
            loss = max(abs(step.loss - step.reference_loss) / (step.reference_loss or 1.0) for step in verdict.steps)
            gradient, weight = (max(getattr(step, name) for step in verdict.steps) for name in ("gradient", "weight"))
            within = max(step.within for step in verdict.steps)
            cells += [f"{loss:.1e}", f"{gradient:.1e}", f"{weight:.1e}", f"{within:.0%}"]
        else:
            cells += ["", "", "", ""]
        cells.append("equal" if verdict.is_equal else (verdict.explain().splitlines() or [""])[-1])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
