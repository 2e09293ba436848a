"""The matrix covers every pair, with few rows, the same everywhere."""

from __future__ import annotations

import itertools

from internlm.verify import matrix
from internlm.verify.case import Combination


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


def test_every_pair_that_goes_together_is_in_a_row() -> None:
    rows = matrix.pairwise_matrix()
    for one, other in itertools.combinations(matrix.AXES, 2):
        for pair in itertools.product(matrix.AXES[one], matrix.AXES[other]):
            if matrix._can_be_completed(dict(zip((one, other), pair, strict=True))):
                assert any(holds(row, pair[0]) and holds(row, pair[1]) for row in rows), pair


def test_rows_are_few_valid_and_always_the_same() -> None:
    rows = matrix.pairwise_matrix()
    assert 60 <= len(rows) <= 120
    assert len(set(rows)) == len(rows)
    assert rows == matrix.pairwise_matrix()
    for row in rows:
        assert row.ranks <= matrix.LARGEST_WORLD and not row.problems()


def test_the_full_matrix_has_every_layout() -> None:
    rows = matrix.full_matrix()
    assert len(rows) > 400
    layouts = {row.layout for row in rows}
    assert layouts >= {row.layout for row in matrix.pairwise_matrix()}
    for option in itertools.chain(*matrix.AXES.values()):
        assert any(holds(row, option) for row in rows), option


def test_fsdp_meets_neither_pipelines_nor_isp() -> None:
    row = {"data": "data=2 layout:fsdp"}
    assert matrix._can_be_completed(row)
    assert not matrix._can_be_completed({**row, "pipeline": "layout:pipeline=2"})
    assert not matrix._can_be_completed({**row, "split": "layout:tensor=2,mode=isp"})
