"""Runs a combination of layout, model and batch on forked ranks, and compares it with one process."""

from __future__ import annotations

from collections.abc import Callable

# Before any fork.
import internlm.verify.warm_up  # noqa: F401
from helpers.ranks import RankPool
from internlm.verify.case import Case, Combination
from internlm.verify.record import Record, join_ranks
from internlm.verify.report import Verdict, judge
from internlm.verify.run import run_case

STEPS = 2
"""The second shows that gradients were forgotten, moments kept and weights gathered."""

_references: dict[tuple[str, int], Record] = {}


def record_of(case: Case, ranks: Callable[[int], RankPool], steps: int = STEPS) -> Record:
    """What a case computes."""
    return join_ranks(ranks(case.world_size).run(run_case, case, steps))


def reference_of(case: Case, ranks: Callable[[int], RankPool], steps: int = STEPS) -> Record:
    """What one process computes; many layouts share it."""
    reference = case.reference()
    key = reference.fingerprint, steps
    if key not in _references:
        _references[key] = record_of(reference, ranks, steps)
    return _references[key]


def verdict_of(text: str, ranks: Callable[[int], RankPool], steps: int = STEPS) -> Verdict:
    """The combination that a text names, against one process."""
    case = Combination.parse(text).case()
    return judge(case, record_of(case, ranks, steps), reference_of(case, ranks, steps))


def assert_equal_to_one_process(text: str, ranks: Callable[[int], RankPool], steps: int = STEPS) -> None:
    """Loss, gradient norm, every gradient and every weight of every step are those of one process."""
    verdict = verdict_of(text, ranks, steps)
    assert verdict.is_equal, f"{text}\n{verdict.explain()}"


def settings(text: str) -> set[str]:
    """The values of a combination that are not defaults; for "does a row have this option?"."""
    named = " ".join(word for word in text.split() if not word.startswith(("ranks=", "data=")))
    return {
        f"{group.partition(':')[0]}:{setting}"
        for group in str(Combination.parse(f"ranks=1 {named}")).split()[1:]
        for setting in group.partition(":")[2].split(",")
    }
