"""Fill-in-the-middle (Bavarian et al. 2022): moves the middle of a document behind its suffix.

A transform of token ids that keeps their number: the last three tokens (before eos) make room for the three sentinels.
Random draws are a pure function of a key, so the transform needs no state.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from internlm.data.permutation import derive_key

Level = Literal["document", "context"]
NUM_SENTINELS = 3
_Tokens = tuple[NDArray[np.int64], NDArray[np.bool_]]


@dataclass(frozen=True)
class FillInTheMiddle:
    """Which documents are transformed, and how.

    With probability `spm_rate` the order is PRE SUF suffix MID prefix middle (SPM, in the variant of Bavarian et al.
    that is trained together with PSM), otherwise PRE prefix SUF suffix MID middle (PSM).

    Attributes:
        rate: probability that a document, or a part of one, is transformed.
        spm_rate: share of SPM.
        prefix, middle, suffix: ids of the sentinels PRE, MID and SUF.
        level: "document" transforms whole documents before they are cut, "context" each part of a document within an
            attention segment, so that a middle always attends to its prefix and suffix.
        bos, eos: ids that stay first and last where a document begins or ends with them; None: there is none.
        seed: of all draws.
    """

    rate: float
    spm_rate: float
    prefix: int
    middle: int
    suffix: int
    level: Level
    bos: int | None
    eos: int | None
    seed: int

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that the transform depends on, as JSON values."""
        return asdict(self)

    def transform(self, ids: NDArray[np.int64], loss_mask: NDArray[np.bool_], *key: int) -> _Tokens | None:
        """Transform a document, or part of one.

        Args:
            ids: int64 [n].
            loss_mask: bool [n]; False where a token contributes no loss. Moves with its token. A sentinel contributes
                loss if any token does.
            key: what the draws depend on besides the seed, such as the number of the document.

        Returns:
            (ids, loss_mask), both [n]; None if the document is not selected, or has no token beside the sentinels.
        """
        is_selected, is_spm, *cuts = (derive_key(self.seed, *key, draw) for draw in range(4))
        if is_selected >= self.rate * 2.0**64:
            return None
        first = int(len(ids) > 0 and ids[0] == self.bos)
        last = len(ids) - int(len(ids) > first and ids[-1] == self.eos)
        num_kept = last - first - NUM_SENTINELS
        if num_kept < 1:
            return None
        # Uniform over the num_kept + 1 borders between tokens, both ends included.
        start, stop = (first + (cut * (num_kept + 1) >> 64) for cut in sorted(cuts))
        has_loss = loss_mask[first:last].any()

        def sentinel(token: int) -> _Tokens:
            return np.array([token], dtype=np.int64), np.array([has_loss], dtype=np.bool_)

        def part(begin: int, end: int) -> _Tokens:
            return ids[begin:end], loss_mask[begin:end]

        prefix, middle, suffix = part(first, start), part(start, stop), part(stop, first + num_kept)
        pre, mid, suf = sentinel(self.prefix), sentinel(self.middle), sentinel(self.suffix)
        order = (
            (pre, suf, suffix, mid, prefix, middle)
            if is_spm < self.spm_rate * 2.0**64
            else (pre, prefix, suf, suffix, mid, middle)
        )
        parts = (part(0, first), *order, part(last, len(ids)))
        return np.concatenate([each for each, _ in parts]), np.concatenate([each for _, each in parts])
