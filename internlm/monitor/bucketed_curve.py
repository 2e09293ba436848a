"""The numbers of one name over the steps of a run, in a bounded number of buckets."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from typing import Any

MAX_BUCKETS = 2048
"""About as many as a screen has columns; even."""


class BucketedCurve:
    """The numbers of one name, by bucket.

    Attributes:
        step: of the newest number.
        value: the newest number.
        nonfinite: how many numbers are "nan", "inf" and "-inf"; they are in no bucket.
    """

    def __init__(self) -> None:
        self._count = array("l", [0]) * MAX_BUCKETS
        self._sum = array("d", [0.0]) * MAX_BUCKETS
        self._low = array("d", [math.inf]) * MAX_BUCKETS
        self._high = array("d", [-math.inf]) * MAX_BUCKETS
        self._before = (0, 0, 0.0, math.inf, -math.inf)
        self.step = -1
        self.value = math.nan
        self.nonfinite: Counter[str] = Counter()

    def add(self, step: int, bucket: int, value: float) -> None:
        """Add the number of a step; it replaces the newest one if that is of the same step."""
        if step == self.step:
            self._remove_newest()
        count, total, low, high = self._count[bucket], self._sum[bucket], self._low[bucket], self._high[bucket]
        self._before = (bucket, count, total, low, high)
        self.step, self.value = step, value
        if not math.isfinite(value):
            self.nonfinite[str(value)] += 1
            return
        self._count[bucket] = count + 1
        self._sum[bucket] = total + value
        if value < low:
            self._low[bucket] = value
        if value > high:
            self._high[bucket] = value

    def _remove_newest(self) -> None:
        bucket, count, total, low, high = self._before
        self._count[bucket], self._sum[bucket], self._low[bucket], self._high[bucket] = count, total, low, high
        if not math.isfinite(self.value):
            self.nonfinite[str(self.value)] -= 1

    def merge_neighbours(self) -> None:
        """Double the width of the buckets."""
        self._count = array("l", [*map(int.__add__, *_pairs(self._count)), *[0] * (MAX_BUCKETS // 2)])
        self._sum = array("d", [*map(float.__add__, *_pairs(self._sum)), *[0.0] * (MAX_BUCKETS // 2)])
        self._low = array("d", [*map(min, *_pairs(self._low)), *[math.inf] * (MAX_BUCKETS // 2)])
        self._high = array("d", [*map(max, *_pairs(self._high)), *[-math.inf] * (MAX_BUCKETS // 2)])

    def points(self, start: int, stop: int) -> dict[str, list[float | None]]:
        """Mean, lowest and highest number of some buckets; None where there is none."""
        count = self._count[start:stop]
        return {
            "mean": [total / n if n else None for total, n in zip(self._sum[start:stop], count, strict=True)],
            "low": [value if n else None for value, n in zip(self._low[start:stop], count, strict=True)],
            "high": [value if n else None for value, n in zip(self._high[start:stop], count, strict=True)],
        }


def _pairs(values: array[Any]) -> tuple[array[Any], array[Any]]:
    return values[::2], values[1::2]
