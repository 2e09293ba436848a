"""AdamW's second coefficient over the steps."""

from __future__ import annotations

import pytest

from internlm.solver.beta2_scheduler import Beta2Schedule
from internlm.utils.errors import ConfigError


@pytest.mark.parametrize("c", [0.0, -1.0])
def test_constant_without_a_positive_exponent(c):
    schedule = Beta2Schedule(0.95, c)
    assert {schedule.beta2(step) for step in (0, 1, 10, 100_000)} == {0.95}


def test_rises_from_the_floor():
    schedule = Beta2Schedule(0.95, 0.8)
    assert schedule.beta2(0) == 0.95  # t = 1: 1 - 1 is below the floor
    # 1 - t^-0.8 passes 0.95 at t = 20^(1 / 0.8) = 42.3
    assert schedule.beta2(41) == 0.95
    assert schedule.beta2(42) > 0.95
    assert schedule.beta2(31) == 0.95
    assert schedule.beta2(99_999) == pytest.approx(1 - 1e-4)  # 100000^-0.8 = 10^-4


def test_cur_iter_starts_in_the_middle():
    whole, rest = Beta2Schedule(0.5, 0.5), Beta2Schedule(0.5, 0.5, cur_iter=9)
    assert [rest.beta2(step) for step in range(50)] == [whole.beta2(step) for step in range(10, 60)]


def test_bad_values_are_refused():
    with pytest.raises(ConfigError, match=r"init_beta2 = 1\.0"):
        Beta2Schedule(1.0)
    with pytest.raises(ConfigError, match="cur_iter = -2"):
        Beta2Schedule(0.9, cur_iter=-2)
