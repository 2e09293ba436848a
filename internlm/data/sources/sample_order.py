"""The order of samples: a pure function of (number of samples, seed, global sample index).

Epoch e = g // N visits [0, N) in a keyed permutation of its own, evaluated for each index alone. The state of the order
is therefore one number, and neither the number of ranks nor that of workers changes it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from internlm.data.permutation import derive_key, permute


def sample_order(global_indices: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.int64]:
    """Map global sample indices to samples; every epoch has its own permutation.

    Args:
        global_indices: int64 [n], counted over all epochs.
        num_samples: samples of one epoch.
        seed: of the run.

    Returns:
        int64 [n], each in [0, num_samples).
    """
    epochs = global_indices // num_samples
    result = np.empty_like(global_indices)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        result[here] = permute(global_indices[here] % num_samples, num_samples, derive_key(seed, int(epoch)))
    return result
