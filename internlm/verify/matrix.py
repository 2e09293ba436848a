"""The matrix of layouts and models that the tests compare: a pairwise covering of the options of all axes.

Most defects need the interaction of at most two features (Kuhn et al. 2004, doi:10.1109/TSE.2004.24). So a set of rows
in which every pair of options occurs finds most of them, at a hundredth of the cost of all rows.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from random import Random

from internlm.verify.case import Combination

LARGEST_WORLD = 8

AXES: Mapping[str, tuple[str, ...]] = {
    "split": (
        "",
        "layout:tensor=2,mode=mtp",
        "layout:tensor=2,mode=msp",
        "layout:tensor=2,mode=fsp",
        "layout:tensor=2,mode=isp",
        "layout:tensor=2,mode=isp,weight=2",
        "layout:tensor=2,mode=isp,weight=4,overlap",
        "layout:mode=isp,weight=2,overlap",
        "layout:tensor=4,mode=msp",
        "layout:tensor=4,mode=isp,weight=2",
    ),
    "pipeline": (
        "",
        "layout:pipeline=2",
        "layout:pipeline=4",
        "layout:pipeline=2,chunks=2",
        "layout:pipeline=2,schedule=ZBH1",
        "layout:pipeline=2,schedule=ZBV",
        "layout:pipeline=2,schedule=DUALPIPEV",
        "layout:pipeline=4,schedule=ZBV",
    ),
    "data": (
        "data=1",
        "data=2",
        "data=2 layout:zero=1",
        "data=4 layout:zero=2",
        "data=2 layout:fsdp",
    ),
    "optimizer": (
        "",
        "stepping:overlap_grad,overlap_param,bucket=1000",
        "stepping:clip=0,overlap_param",
        "stepping:offload,overlap_grad",
    ),
    "documents": (
        "",
        "documents:packed=false",
        "documents:masked=micro_batches",
        "documents:masked=ends,ragged=false",
        "documents:packed=false,masked=none,ragged=false",
    ),
    "heads": ("", "model:kv_heads=2", "model:kv_heads=1"),
    "family": (
        "",
        "model:family=INTERNLM,bias=true",
        "model:family=LLAMA2,split_hidden=false",
        "model:family=QWEN2",
        "model:family=QWEN3",
        "model:family=BAICHUAN2",
        "model:family=GEMMA",
        "model:fused=true",
    ),
    "dtype": ("", "model:dtype=bfloat16", "model:dtype=bfloat16,fp32_norm,fp32_residual"),
    "checkpoint": (
        "",
        "model:checkpoint=0.5",
        "model:checkpoint=1",
        "model:checkpoint=1,save_policy=attention",
        "model:checkpoint=0.5,save_policy=matmuls",
    ),
    "tied": ("", "model:tied=true"),
}
"""Axis -> its options, in the text form of `Combination`; `data=N` is the number of ranks with different data."""

GROUPS = (
    "ranks=4 layout:tensor=2,mode=isp,weight=2,pipeline=2,schedule=ZBV stepping:groups=frozen_layer,overlap_param",
    "ranks=2 layout:fsdp model:checkpoint=1 stepping:groups=frozen_ends",
    "ranks=4 layout:tensor=2,mode=msp,zero=1 stepping:groups=factors,overlap_grad",
)
"""Rows with parameter groups, which interact with sharding and with the pipeline schedule."""

# Only the options of these axes can exclude each other; all others combine freely.
CONSTRAINED = ("split", "pipeline", "data", "optimizer")

Row = Mapping[str, str]
Choice = tuple[str, str]
"""Axis and option."""


def combination_of(row: Row) -> Combination:
    """The combination of one option per axis; an axis that is missing takes its first option."""
    words = " ".join(row.values()).split()
    data = next((int(word.removeprefix("data=")) for word in words if word.startswith("data=")), 1)
    text = " ".join(word for word in words if not word.startswith("data="))
    layout = Combination.parse(f"ranks=1 {text}").layout
    return Combination.parse(f"ranks={layout.pipeline * layout.tensor * data} {text}")


def pairwise_matrix() -> list[Combination]:
    """Rows in which every valid pair of options occurs, followed by `GROUPS`; equal on every machine."""
    names = list(AXES)
    missing = {
        pair
        for one, other in itertools.combinations(names, 2)
        for pair in itertools.product([(one, o) for o in AXES[one]], [(other, o) for o in AXES[other]])
        if _can_be_completed(dict(pair))
    }
    rows: list[Combination] = []
    used: Counter[Choice] = Counter()
    order = sorted(missing, key=lambda pair: [names.index(name) * 100 + AXES[name].index(o) for name, o in pair])
    for pair in order:
        if pair in missing:
            row = _fill(dict(pair), missing, used)
            used.update(row.items())
            missing -= set(itertools.combinations([(name, row[name]) for name in names], 2))
            rows.append(combination_of(row))
    return rows + [Combination.parse(text) for text in GROUPS]


def full_matrix() -> list[Combination]:
    """All layouts of the matrix, with options of the other axes sampled from a fixed seed."""
    names = [name for name in AXES if name not in CONSTRAINED]
    rows = []
    random = Random(0)
    for options in itertools.product(*(AXES[name] for name in CONSTRAINED)):
        row = dict(zip(CONSTRAINED, options, strict=True))
        if _fits(tuple(row.items())):
            row |= {name: random.choice(AXES[name]) for name in names}
            rows.append(combination_of(row))
    return rows


def _fill(row: dict[str, str], missing: set[tuple[Choice, Choice]], used: Counter[Choice]) -> dict[str, str]:
    """Complete a row with, on each axis, the option that adds most missing pairs; ties go to the least used one."""
    for name in AXES:
        if name in row:
            continue
        scores = {}
        for option in AXES[name]:
            choice = (name, option)
            if _can_be_completed({**row, name: option}):
                new_pairs = sum((choice, other) in missing or (other, choice) in missing for other in row.items())
                scores[option] = (new_pairs, -used[choice])
        row[name] = max(scores, key=scores.__getitem__)
    return row


def _can_be_completed(row: Row) -> bool:
    """Whether a valid row with these options exists."""
    return _completes(tuple(row.get(name) for name in CONSTRAINED))


@cache
def _completes(given: Sequence[str | None]) -> bool:
    choices = [AXES[name] if option is None else (option,) for name, option in zip(CONSTRAINED, given, strict=True)]
    return any(_fits(tuple(zip(CONSTRAINED, options, strict=True))) for options in itertools.product(*choices))


@cache
def _fits(options: tuple[tuple[str, str], ...]) -> bool:
    combination = combination_of(dict(options))
    return combination.ranks <= LARGEST_WORLD and not combination.problems()
