"""A pairwise covering of the options of some axes.

Most defects need the interaction of at most two features (Kuhn et al. 2004, doi:10.1109/TSE.2004.24). So a set of rows
in which every pair of options occurs finds most of them, at a hundredth of the cost of all rows.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from random import Random

from internlm.verify.case import Combination

LARGEST_WORLD = 8

Row = Mapping[str, str]
Choice = tuple[str, str]
"""Axis and option."""


class Covering:
    """Rows of options, one of each axis.

    Args:
        axes: axis -> its options, in the text form of `Combination`; `data=N` is the number of ranks with different
            data.
        constrained: the axes whose options can exclude each other; all others combine freely.
    """

    def __init__(self, axes: Mapping[str, tuple[str, ...]], constrained: tuple[str, ...]) -> None:
        self.axes = axes
        self._constrained = constrained
        self._valid: dict[tuple[str, ...], bool] = {}
        self._completable: dict[tuple[str | None, ...], bool] = {}

    def pairwise(self) -> list[Combination]:
        """Rows in which every valid pair of options occurs; equal on every machine."""
        names = list(self.axes)
        missing = {
            pair
            for one, other in itertools.combinations(names, 2)
            for pair in itertools.product([(one, o) for o in self.axes[one]], [(other, o) for o in self.axes[other]])
            if self.can_be_completed(dict(pair))
        }
        rows: list[Combination] = []
        used: Counter[Choice] = Counter()
        order = sorted(
            missing, key=lambda pair: [names.index(name) * 100 + self.axes[name].index(o) for name, o in pair]
        )
        for pair in order:
            if pair in missing:
                row = self._fill(dict(pair), missing, used)
                used.update(row.items())
                missing -= set(itertools.combinations([(name, row[name]) for name in names], 2))
                rows.append(combination_of(row))
        return rows

    def full(self) -> list[Combination]:
        """All rows of the constrained axes, with options of the other axes sampled from a fixed seed."""
        names = [name for name in self.axes if name not in self._constrained]
        rows = []
        random = Random(0)
        for options in itertools.product(*(self.axes[name] for name in self._constrained)):
            if self._is_valid(options):
                row = dict(zip(self._constrained, options, strict=True))
                row |= {name: random.choice(self.axes[name]) for name in names}
                rows.append(combination_of(row))
        return rows

    def can_be_completed(self, row: Row) -> bool:
        """Whether a valid row with these options exists."""
        given = tuple(row.get(name) for name in self._constrained)
        if given not in self._completable:
            choices = [
                self.axes[name] if option is None else (option,)
                for name, option in zip(self._constrained, given, strict=True)
            ]
            self._completable[given] = any(map(self._is_valid, itertools.product(*choices)))
        return self._completable[given]

    def _fill(self, row: dict[str, str], missing: set[tuple[Choice, Choice]], used: Counter[Choice]) -> dict[str, str]:
        """Complete a row with, on each axis, the option that adds most missing pairs; ties go to the least used one."""
        for name in self.axes:
            if name in row:
                continue
            scores = {}
            for option in self.axes[name]:
                choice = (name, option)
                if self.can_be_completed({**row, name: option}):
                    new_pairs = sum((choice, other) in missing or (other, choice) in missing for other in row.items())
                    scores[option] = (new_pairs, -used[choice])
            row[name] = max(scores, key=scores.__getitem__)
        return row

    def _is_valid(self, options: tuple[str, ...]) -> bool:
        if options not in self._valid:
            first = {name: options_of_axis[0] for name, options_of_axis in self.axes.items()}
            combination = combination_of(first | dict(zip(self._constrained, options, strict=True)))
            self._valid[options] = combination.ranks <= LARGEST_WORLD and not combination.problems()
        return self._valid[options]


def combination_of(row: Row) -> Combination:
    """The combination of one option per axis."""
    words = " ".join(row.values()).split()
    data = next((int(word.removeprefix("data=")) for word in words if word.startswith("data=")), 1)
    text = " ".join(word for word in words if not word.startswith("data="))
    layout = Combination.parse(f"ranks=1 {text}").layout
    return Combination.parse(f"ranks={layout.pipeline * layout.tensor * layout.context * data} {text}")
