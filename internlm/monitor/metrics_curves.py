"""Reads `metrics.jsonl` while it grows, into curves of a bounded size.

A long run has more steps than a screen has columns. The steps are cut into at most `MAX_BUCKETS` buckets of equal
width; a bucket has the mean, the lowest and the highest value of each name. When the run outgrows them, the width
doubles and neighbours are merged, so memory depends on the number of names alone.

Only what was appended is read, in whole lines. Where a file goes back to an earlier step, what was written before about
later steps is superseded, as in a run that resumed; the file is then read once more without those lines.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from internlm.monitor.bucketed_curve import MAX_BUCKETS, BucketedCurve
from internlm.utils.json_text import check_text, json_object

MAX_NAMES = 1000
"""More than a run has; the numbers of further ones are counted and not shown."""
MAX_TEXT = 300
"""Characters of a text, such as `mfu_convention`."""
READ_BYTES = 1 << 20
_TAIL = 64


class _Superseded(NamedTuple):
    """Lines before a position of the file are superseded if their step is later than this one."""

    position: int
    step: int


class MetricsCurves:
    """The curves of a metrics file.

    Args:
        path: the file, which may come later.

    Attributes:
        is_missing: whether there is no such file.
        version: changes when earlier points have changed, and not when points are appended.
        num_restarts: how often the file was replaced or cut while it was watched.
        num_superseded: lines of steps that later lines have again.
        num_unreadable: lines that are no JSON object with a step.
        num_names_omitted: numbers that are not shown, because there are too many names.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.version = 0
        self.num_restarts = 0
        self.is_missing = True
        self._superseded: list[_Superseded] = []
        self._forget_file()

    def _forget_file(self) -> None:
        self._superseded.clear()
        self._identity: tuple[int, int] | None = None
        self._start_over()

    def _start_over(self) -> None:
        """Forget what was read, but for the lines that are known to be superseded."""
        self.version += 1
        self._position, self._tail = 0, b""
        self._is_in_long_line = False
        self._num_passed = 0
        self._is_out_of_order = False
        self._curves: dict[str, BucketedCurve] = {}
        self._texts: dict[str, str] = {}
        self._origin: int | None = None
        self._width = 1
        self._step: int | None = None
        self.num_superseded = self.num_unreadable = self.num_names_omitted = 0

    def update(self, seconds: float = 1.0) -> bool:
        """Read what was appended, for about so long.

        Returns:
            Whether the end of the file was reached.

        Raises:
            OSError: the file cannot be read.
        """
        deadline = time.monotonic() + seconds
        while not self._read():
            if time.monotonic() > deadline:
                return False
        return True

    def _read(self) -> bool:
        """Read some lines; returns whether there are no more."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            if not self.is_missing:
                self.num_restarts += 1
                self._forget_file()
            self.is_missing = True
            return True
        with file:
            self.is_missing = False
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if self._identity is not None and (identity != self._identity or self._has_changed(file)):
                self.num_restarts += 1
                self._forget_file()
            self._identity = identity
            file.seek(self._position)
            data = file.read(READ_BYTES)
        self._take(data)
        if len(data) == READ_BYTES:
            return False
        if self._is_out_of_order:
            self._start_over()
            return False
        return True

    def _has_changed(self, file: BinaryIO) -> bool:
        """Whether what was read last is not there any more."""
        file.seek(self._position - len(self._tail))
        return file.read(len(self._tail)) != self._tail

    def _take(self, data: bytes) -> None:
        end = data.rfind(b"\n") + 1
        if not end and len(data) == READ_BYTES:
            # No line of numbers is so long.
            self.num_unreadable += not self._is_in_long_line
            self._is_in_long_line, end = True, len(data)
        elif end:
            for line in data[:end].splitlines(keepends=True):
                if self._is_in_long_line:
                    self._is_in_long_line = False
                else:
                    self._add_line(line)
                self._position += len(line)
            self._tail = data[max(end - _TAIL, 0) : end]
            return
        self._position += end
        self._tail = data[max(end - _TAIL, 0) : end] or self._tail

    def _add_line(self, line: bytes) -> None:
        try:
            values = json_object(line)
            check_text(values)
            step = _step(values["step"])
        except (ValueError, KeyError):
            self.num_unreadable += 1
            return
        if self._is_superseded(step):
            self.num_superseded += 1
            return
        if self._step is not None and step < self._step:
            while self._superseded and self._superseded[-1].step >= step:
                self._superseded.pop()
            self._superseded.append(_Superseded(self._position, step))
            self._is_out_of_order = True
        if not self._is_out_of_order:
            self._make_room(step)
            self._add(step, values)
        self._step = step

    def _is_superseded(self, step: int) -> bool:
        """Whether a line at the present position is; the rules are in the order of position, and of step."""
        rules = self._superseded
        while self._num_passed < len(rules) and rules[self._num_passed].position <= self._position:
            self._num_passed += 1
        return self._num_passed < len(rules) and step > rules[self._num_passed].step

    def _make_room(self, step: int) -> None:
        """Widen the buckets until there is one for a step."""
        if self._origin is None:
            self._origin = step
        while self._bucket(step) >= MAX_BUCKETS:
            for curve in self._curves.values():
                curve.merge_neighbours()
            self._width *= 2
            self.version += 1

    def _add(self, step: int, values: dict[str, Any]) -> None:
        labels = values.get("nonfinite")
        bucket = self._bucket(step)
        is_repeated = False
        for name, value in values.items():
            if isinstance(value, str):
                if name in self._texts or len(self._texts) < MAX_NAMES:
                    self._texts[name] = value[:MAX_TEXT]
            elif name not in ("step", "nonfinite") and (value is None or isinstance(value, int | float)):
                curve = self._curves.get(name) or self._add_curve(name)
                if curve is None:
                    self.num_names_omitted += 1
                    continue
                is_repeated |= curve.step == step
                if type(value) is not float:
                    value = _number(value, labels.get(name) if isinstance(labels, dict) else None)
                curve.add(step, bucket, value)
        self.num_superseded += is_repeated

    def _add_curve(self, name: str) -> BucketedCurve | None:
        """The curve of a name that has none yet; None if there are too many names."""
        if len(self._curves) == MAX_NAMES:
            return None
        self._curves[name] = BucketedCurve()
        return self._curves[name]

    def _bucket(self, step: int) -> int:
        assert self._origin is not None
        return (step - self._origin) // self._width

    def view(self, names: Sequence[str], version: int | None = None, start: int = 0) -> dict[str, Any]:
        """What a page shows, as JSON.

        Args:
            names: of the curves; unknown ones are left out.
            version: what the page has already; None: nothing.
            start: the first bucket that may have changed since then, for a page with this version.

        Returns:
            `version`; `width` of a bucket in steps; `first`, the number of the first bucket; `steps`, the first step of
            each bucket from there; `curves` by name, as `mean` and, for buckets of several steps, `low` and `high`;
            all `names`; `newest`, for each name its step and value; `texts`; and `nonfinite`, counts by name and kind.
        """
        stop = 0 if self._step is None or self._origin is None else self._bucket(self._step) + 1
        first = max(start, 0) if version == self.version else 0
        curves = {name: self._curves[name].points(first, stop) for name in names if name in self._curves}
        if self._width == 1:
            curves = {name: {"mean": points["mean"]} for name, points in curves.items()}
        origin = self._origin or 0
        return {
            "version": self.version,
            "width": self._width,
            "first": first,
            "steps": [origin + self._width * bucket for bucket in range(first, stop)],
            "last_step": self._step,
            "curves": curves,
            "names": sorted(self._curves),
            "newest": {name: [curve.step, _shown(curve.value)] for name, curve in self._curves.items()},
            "texts": self._texts,
            "nonfinite": {name: +curve.nonfinite for name, curve in self._curves.items() if +curve.nonfinite},
        }


def _step(value: Any) -> int:
    """A step of a run; anything else is a ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53 or value != int(value):
        raise ValueError(f"{value!r} is no step")
    return int(value)


def _number(value: float | None, label: Any) -> float:
    """A number of a line; `label` is what "nonfinite" calls it."""
    if value is None:
        return float(label) if label in ("nan", "inf", "-inf") else math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _shown(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
