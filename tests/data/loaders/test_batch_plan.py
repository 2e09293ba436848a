"""Ramp-up of the batch size, and skipped steps."""

import pytest

from internlm.data.loaders.batch_plan import RampUp, parse_skip_batches
from internlm.utils.errors import ConfigError


def test_ramp_up():
    ramp = RampUp.parse("2 3 4", micro_num=10)
    assert [ramp.micro_num_at(step) for step in range(14)] == [2] * 4 + [5] * 4 + [8] * 4 + [10] * 2
    assert [RampUp.parse(" ", 7).micro_num_at(step) for step in (0, 100)] == [7, 7]


@pytest.mark.parametrize("text", ["1", "1 2", "a b c", "1 1 0", "0 1 1", "1 0 1", "9 1 1", "1 2 3 4"])
def test_bad_ramp_up(text):
    with pytest.raises(ConfigError, match=f"data.rampup_batch_size = '{text}'"):
        RampUp.parse(text, micro_num=8)


def test_skip_batches():
    skip = parse_skip_batches("2-5, 7,")
    assert [step for step in range(10) if skip.contains(step)] == [2, 3, 4, 5, 7]
    assert not parse_skip_batches("").contains(0)


@pytest.mark.parametrize("text", ["x", "5-2", "-3", "1-", "1-2-3"])
def test_bad_skip_batches(text):
    with pytest.raises(ConfigError, match=f"data.skip_batches = '{text}'"):
        parse_skip_batches(text)
