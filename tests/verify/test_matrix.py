"""The matrix covers every pair, with few rows, the same everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from internlm.verify import matrix
from internlm.verify.case import Combination
from internlm.verify.covering import LARGEST_WORLD, Covering


def holds(combination: Combination, option: str) -> bool:
    """Whether a combination has what an option says."""
    words = [word for word in option.split() if not word.startswith("data=")]
    wanted = Combination.parse(" ".join(["ranks=1", *words]))
    plain = Combination()
    for part in ("layout", "model", "documents", "stepping"):
        default, choice, actual = getattr(plain, part), getattr(wanted, part), getattr(combination, part)
        for name in vars(choice):
            if getattr(choice, name) not in (getattr(default, name), getattr(actual, name)):
                return False
    return True


MATRICES = ((matrix.DENSE, matrix.pairwise_matrix), (matrix.EXPERTS, matrix.expert_matrix))


@pytest.mark.parametrize(("covering", "rows_of"), MATRICES)
def test_every_pair_that_goes_together_is_in_a_row(
    covering: Covering, rows_of: Callable[[], list[Combination]]
) -> None:
    rows = rows_of()
    for one, other in itertools.combinations(covering.axes, 2):
        for pair in itertools.product(covering.axes[one], covering.axes[other]):
            if covering.can_be_completed(dict(zip((one, other), pair, strict=True))):
                assert any(holds(row, pair[0]) and holds(row, pair[1]) for row in rows), pair


@pytest.mark.parametrize(("covering", "rows_of"), MATRICES)
def test_rows_are_few_valid_and_always_the_same(covering: Covering, rows_of: Callable[[], list[Combination]]) -> None:
    rows = rows_of()
    assert 60 <= len(rows) <= 120
    assert len(set(rows)) == len(rows)
    assert rows == rows_of()
    for row in rows:
        assert row.ranks <= LARGEST_WORLD and not row.problems()


def test_the_full_matrix_has_every_layout() -> None:
    rows = matrix.full_matrix()
    assert len(rows) > 400
    layouts = {row.layout for row in rows}
    assert layouts >= {row.layout for row in matrix.pairwise_matrix() + matrix.expert_matrix()}
    for option in itertools.chain(*matrix.DENSE.axes.values(), *matrix.EXPERTS.axes.values()):
        assert any(holds(row, option) for row in rows), option


def test_fsdp_meets_neither_pipelines_nor_isp() -> None:
    row = {"data": "data=2 layout:fsdp"}
    assert matrix.DENSE.can_be_completed(row)
    assert not matrix.DENSE.can_be_completed({**row, "pipeline": "layout:pipeline=2"})
    assert not matrix.DENSE.can_be_completed({**row, "split": "layout:tensor=2,mode=isp"})
