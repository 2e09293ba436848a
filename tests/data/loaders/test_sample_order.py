"""The order of samples: a bijection, different for each epoch and seed, and well mixed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.data.loaders.batch_plan import RampUp, parse_skip_batches
from internlm.data.loaders.sample_order import sample_order
from internlm.data.permutation import permute
from internlm.utils.errors import ConfigError


@given(size=st.integers(1, 3000), key=st.integers(-(2**70), 2**70))
def test_permute_is_a_bijection(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(size=st.integers(1, 2**62), key=st.integers(0, 2**64 - 1), data=st.data())
def test_large_permutations_stay_in_range_and_do_not_collide(size, key, data):
    indices = np.unique(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50)))
    images = permute(indices, size, key)
    assert images.min() >= 0 and images.max() < size and len(np.unique(images)) == len(indices)


def test_one_index_alone_has_the_same_image():
    together = permute(np.arange(1000), 1000, 5)
    assert all(permute(np.array([i]), 1000, 5)[0] == together[i] for i in range(0, 1000, 97))


def test_permutation_is_well_mixed():
    # For a uniform permutation, displacement / size has mean 1/3 and neighbours land independently; n = 10^5 makes the
    # standard error of both means below 0.001.
    size = 100_000
    for key in range(3):
        images = permute(np.arange(size), size, key)
        assert abs(np.abs(images - np.arange(size)).mean() / size - 1 / 3) < 0.005
        assert abs(np.abs(np.diff(images)).mean() / size - 1 / 3) < 0.005
    # Small sizes: each of the 4! orders of 4 samples occurs; expected 100 of 2400 each, 5 standard deviations = 49.
    orders, counts = np.unique([permute(np.arange(4), 4, key) for key in range(2400)], axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 51 and counts.max() < 149


def test_each_epoch_and_seed_has_its_own_permutation():
    epochs = sample_order(np.arange(300), 100, seed=1).reshape(3, 100)
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs.tolist())
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], sample_order(np.arange(100), 100, seed=2))
    straddling = sample_order(np.arange(95, 105), 100, seed=1)
    assert straddling.tolist() == epochs.ravel()[95:105].tolist()


def test_the_order_is_what_it_was():
    # A change of these numbers changes the data order of every run that resumes: raise the version in the changelog.
    assert sample_order(np.arange(8), 10, seed=1024).tolist() == ORDER_OF_SEED_1024


ORDER_OF_SEED_1024 = [4, 9, 5, 7, 6, 3, 0, 2]


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
