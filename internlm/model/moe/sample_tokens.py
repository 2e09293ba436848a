"""What routers know about the tokens of a sample: which count, and which sequence each belongs to.

A sample is a micro-batch of one data rank, also where several ranks share it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SampleTokens:
    """The t tokens of a sample that a rank routes.

    Attributes:
        valid: bool `[t]`, false for padding; None: no token of the sample is padding.
        num_valid: number of valid tokens of the whole sample, int64 scalar on the device; None where `valid` is.
        sequences: int64 `[t]`, the sequence of each token: an attention segment of a packed row, or a row; None where
            no loss needs it.
        num_sequences: number of sequences of the sample, or a bound on it.
        positions: int64 `[t]`, of the tokens in the sample, where they are dealt in another way than in equal parts of
            each row (`capacity.SamplePart`); else None.
        number: of the sample in the whole run, from which random numbers follow; 0 outside of training.
    """

    valid: Tensor | None = None
    num_valid: Tensor | None = None
    sequences: Tensor | None = None
    num_sequences: int = 0
    positions: Tensor | None = None
    number: int = 0
