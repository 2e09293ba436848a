"""Rules of context ranks: what each says, and that it is silent on a good neighbour; and the layout of a config."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.configs import small_config

from internlm.config.notices import find_notices
from internlm.config.rules import data_ranks, find_problems, weight_data_ranks
from internlm.config.schema import Config
from internlm.config.schema.base import walk_schema
from internlm.config.unsupported import find_ineffective
from internlm.core.context.layout import ParallelLayout
from internlm.initialize.build import build_layout
from internlm.initialize.stages import build_options

SIZE, WINDOW, EXCHANGE = (f"parallel.context.{key}" for key in ("size", "window_size", "exchange"))
TWO = "parallel.sequence_2D"
INTERLEAVED = f"{TWO}.device_placement_strategy.interleaved"
HEAD_FIRST = f"{TWO}.device_placement_strategy.head_first"
TENSOR, MODE = "parallel.tensor.size", "parallel.tensor.mode"


def two(head: int, context: int, window: int = 1, **keys: Any) -> dict[str, Any]:
    """The keys of 2D sequence parallelism."""
    sizes = {f"{TWO}.head_size": head, f"{TWO}.context_size": context, f"{TWO}.window_size": window}
    return {f"{TWO}.enable": True, MODE: "isp", TENSOR: head * context, **sizes, **keys}


# changes of the small config, world size, the only mistake (None: there is none).
CASES: list[tuple[dict[str, Any], int, str | None]] = [
    *[({SIZE: 2, MODE: mode}, 4, None) for mode in ("mtp", "msp", "fsp", "isp")],
    ({SIZE: 2, TENSOR: 2, "parallel.pipeline.size": 2, "parallel.zero1.size": 2}, 8, None),
    # Not as many tokens as ranks divide: a sample is filled up.
    ({SIZE: 3, TENSOR: 2, MODE: "msp", "data.seq_len": 17}, 6, None),
    (
        {SIZE: 3, TENSOR: 2},
        8,
        "parallel.tensor.size = 2 times parallel.context.size = 3 times parallel.pipeline.size = 1 does not divide the "
        "world size 8; start a multiple of 6 ranks or make the parallel sizes smaller",
    ),
    # The state of an optimizer is shared by all ranks with the same weights.
    ({SIZE: 4, TENSOR: 2, "parallel.zero1.size": 8}, 16, None),
    (
        {SIZE: 4, TENSOR: 2, "parallel.zero1.size": 16},
        16,
        "parallel.zero1.size = 16 does not divide the 8 ranks of the same weights; use -1 (all of them) or one of 1, "
        "2, 4, 8",
    ),
    ({SIZE: 4, WINDOW: 2, EXCHANGE: "ring"}, 4, None),
    ({SIZE: 4, WINDOW: 4}, 4, None),
    (
        {SIZE: 4, WINDOW: 3},
        4,
        "parallel.context.window_size = 3 does not divide parallel.context.size = 4; use 1, 2, 4",
    ),
    *[
        (
            {SIZE: 4, WINDOW: 2, EXCHANGE: exchange},
            4,
            f"parallel.context.exchange = '{exchange}' does not work with parallel.context.window_size = 2, which is a "
            "double ring; set parallel.context.exchange = 'ring', or parallel.context.window_size = 1",
        )
        for exchange in ("direct", "all_gather")
    ],
    (two(2, 2), 4, None),
    (two(2, 4, 2, **{HEAD_FIRST: False, INTERLEAVED: True}), 8, None),
    (two(1, 4, 1, **{"parallel.context.cut": "zigzag", EXCHANGE: "all_gather"}), 4, None),
    (
        two(2, 2, 1, **{MODE: "msp"}),
        4,
        f"{TWO}.enable = True needs parallel.tensor.mode = 'isp', which is 'msp'; in this mode use "
        "parallel.context.size",
    ),
    (
        two(2, 2, 1, **{SIZE: 2}),
        8,
        f"parallel.context.size = 2 does not work with {TWO}.enable = True, whose context_size and window_size are "
        "used; set it to 1",
    ),
    (
        two(1, 6, 2, **{INTERLEAVED: True}),
        6,
        f"{INTERLEAVED} = True needs an even number of windows, and there are 3: {TWO}.context_size = 6 over "
        f"{TWO}.window_size = 2; set it to False",
    ),
    (
        two(1, 4, 2, **{EXCHANGE: "direct"}),
        4,
        f"parallel.context.exchange = 'direct' does not work with {TWO}.window_size = 2, which is a double ring; set "
        f"parallel.context.exchange = 'ring', or {TWO}.window_size = 1",
    ),
    # Only head ranks divide heads: there are 4.
    (two(4, 2), 8, None),
    (
        two(8, 1),
        8,
        f"model.num_attention_heads = 4 is not divisible by {TWO}.head_size = 8: each rank computes whole heads; use a "
        "tensor size of 1, 2, 4",
    ),
    (
        {SIZE: 2, "model.compile": True, "model.cuda_graphs": True},
        2,
        "model.cuda_graphs = True does not work with parallel.context.size = 2: context ranks exchange keys and values "
        "in other messages for each sample; set model.cuda_graphs = False",
    ),
    *[
        (
            {**changes, "model.attention_backend": "sdpa"},
            4,
            f"model.attention_backend = 'sdpa' does not work with {key} = 4: attention between context ranks has an "
            "implementation of its own; leave the key out",
        )
        for changes, key in (({SIZE: 4}, SIZE), (two(1, 4), f"{TWO}.context_size"))
    ],
    (two(4, 1, 1, **{"model.attention_backend": "sdpa"}), 4, None),
]


@pytest.mark.parametrize("changes, world_size, mistake", CASES)
def test_rule(changes: dict[str, Any], world_size: int, mistake: str | None) -> None:
    found = list(find_problems(small_config(changes), world_size))
    assert [problem.text for problem in found] == ([] if mistake is None else [mistake])
    known = {path for path, _ in walk_schema(Config)}
    for problem in found:
        assert set(problem.keys) <= known


@pytest.mark.parametrize("changes, world_size", [case[:2] for case in CASES if case[2] is None])
def test_rules_and_layout_count_the_same_ranks(changes: dict[str, Any], world_size: int) -> None:
    config = small_config(changes)
    layout = build_layout(config, world_size)
    assert data_ranks(config, world_size) == layout.data_size
    assert weight_data_ranks(config, world_size) == layout.weight_data_size


def test_the_layout_of_2d_sequence_parallelism() -> None:
    """InternEvo's tensor size is that of heads and context together."""
    config = small_config(two(2, 4, 2, **{HEAD_FIRST: False, INTERLEAVED: True, "parallel.weight.size": 4}))
    layout = build_layout(config, 16)
    assert layout == ParallelLayout(world_size=16, mode="isp", tensor=2, context=4, weight=4, head_first=False)
    assert build_options(config).context.windows == ((0, 2), (1, 3))
    assert build_layout(small_config(two(2, 4)), 8).head_first


def test_windows_of_the_double_ring() -> None:
    options = build_options(small_config({SIZE: 4, WINDOW: 2, "parallel.context.cut": "zigzag"})).context
    assert (options.windows, options.cut, options.movement) == (((0, 1), (2, 3)), "zigzag", "double_ring")
    for exchange, movement in (("auto", "direct"), ("ring", "ring"), ("all_gather", "all_gather")):
        options = build_options(small_config({SIZE: 4, EXCHANGE: exchange})).context
        assert (options.windows, options.movement) == ((), movement)


def test_options_without_context_ranks_are_named() -> None:
    def notices(changes: dict[str, Any]) -> list[str]:
        return [text for text in find_notices(small_config(changes), changes.get, 4) if "context" in text]

    changes = {"parallel.context.cut": "zigzag", EXCHANGE: "ring"}
    (notice,) = notices(changes)
    assert notice == (
        "no effect: parallel.context.cut = 'zigzag', parallel.context.exchange = 'ring' (there is one context rank)"
    )
    assert notices({**changes, SIZE: 2}) == notices(two(1, 4, 1, **changes)) == notices({}) == []


def test_sizes_of_2d_sequence_parallelism_that_is_off_are_named() -> None:
    changes = {f"{TWO}.head_size": 2, f"{TWO}.context_size": 2, MODE: "isp", TENSOR: 4}
    expected = f"no effect: {TWO}.head_size = 2, {TWO}.context_size = 2 ({TWO}.enable = False)"
    assert list(find_ineffective(small_config(changes), changes.get)) == [expected]
