"""The keyed permutation: a bijection, the same for each index alone, and well mixed."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from internlm.data.permutation import permute


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
