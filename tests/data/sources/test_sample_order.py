"""The order of samples: a permutation for each epoch and seed, unchanged between versions."""

import numpy as np

from internlm.data.sources.sample_order import sample_order


def test_each_epoch_and_seed_has_its_own_permutation():
    epochs = sample_order(np.arange(300), 100, seed=1).reshape(3, 100)
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs.tolist())
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0], sample_order(np.arange(100), 100, seed=2))
    straddling = sample_order(np.arange(95, 105), 100, seed=1)
    assert straddling.tolist() == epochs.ravel()[95:105].tolist()


def test_the_order_is_unchanged():
    # A change of these numbers changes the data order of every run that resumes: raise the version in the changelog.
    assert sample_order(np.arange(8), 10, seed=1024).tolist() == ORDER_OF_SEED_1024


ORDER_OF_SEED_1024 = [4, 9, 5, 7, 6, 3, 0, 2]
