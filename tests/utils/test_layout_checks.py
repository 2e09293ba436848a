"""Checks of layout arithmetic: what they refuse, in the words of the caller or in those of a config."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from internlm.core.context.layout import ParallelLayout
from internlm.utils import layout_checks as checks
from internlm.utils.layout_checks import LayoutError


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        (lambda: checks.check_heads(6, 2, 4), ("num_heads", "tensor"), "num_heads = 6 is not divisible by tensor = 4"),
        (lambda: checks.check_heads(12, 6, 4), ("num_kv_heads", "tensor"), "use a tensor size of 1, 2, 3, 6, 12"),
        (
            lambda: checks.check_width(90, 4),
            ("width", "tensor"),
            "divisible by tensor = 4; set width = 92",
        ),
        (
            lambda: checks.check_world(6, a=2, b=2),
            ("a", "b", "world_size"),
            "a = 2 times b = 2 does not divide",
        ),
        (lambda: checks.check_world(6, a=2, b=0), ("b",), "b = 0: it must be 1 or more"),
        (lambda: checks.check_world(6, a=-1), ("a",), "a = -1: it must be 1 or more"),
        (lambda: ParallelLayout(context="2"), ("context",), "context = '2': it must be an integer"),  # type: ignore[arg-type]
        (lambda: ParallelLayout(world_size=2, tensor=True), ("tensor",), "tensor = True: it must be an integer"),
        (lambda: ParallelLayout(pipeline=2.0), ("pipeline",), "pipeline = 2.0: it must be an integer"),  # type: ignore[arg-type]
        (lambda: checks.check_zero(3, 4), ("zero", "data"), "zero = 3 does not divide the 4 ranks of the same weights"),
        (lambda: checks.check_weight(2, "mtp"), ("weight", "mode"), "weight = 2 needs mode = 'isp', which is mtp"),
        (
            lambda: checks.check_fsdp(True, 2, "mtp"),
            ("fsdp", "pipeline"),
            "fsdp = True does not work with pipeline",
        ),
        (lambda: checks.check_fsdp(True, 1, "isp"), ("fsdp", "mode"), "fsdp = True does not work with mode = 'isp'"),
        (lambda: checks.check_schedule("ZBV", 2, 1, 4), ("num_chunks", "mode"), "with mode = 'ZBV'; set it to 2"),
        (lambda: checks.check_schedule("1F1B", 1, 1, 0), ("num_micro_batches",), "num_micro_batches = 0"),
        (
            lambda: checks.check_schedule("1F1B", 4, 2, 6),
            ("num_micro_batches", "num_chunks", "num_ranks"),
            "num_micro_batches = 6: the interleaved schedule (num_chunks = 2) needs a multiple of num_ranks = 4",
        ),
        (
            lambda: checks.check_layer_split(3, 4),
            ("num_stages", "num_layers"),
            "num_stages = 4 is more than",
        ),
        (lambda: checks.check_layer_split(4, 2, [4]), ("sizes", "num_stages"), "sizes = [4] must have 2 numbers"),
        (lambda: checks.check_layer_split(4, 2, [4, 0]), ("sizes",), "sizes = [4, 0]: each stage needs a layer"),
        (
            lambda: checks.check_layer_split(4, 2, [4, 1]),
            ("sizes", "num_layers"),
            "are 5 layers, and must be",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    check: Callable[[], object], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(LayoutError) as caught:
        check()
    assert message in str(caught.value) and caught.value.arguments == arguments


def test_what_fits_passes() -> None:
    checks.check_heads(12, 6, 12)
    checks.check_heads(8, 2, 4)
    checks.check_width(92, 4)
    checks.check_zero(-1, 3)
    checks.check_zero(2, 4)
    checks.check_weight(2, "isp")
    checks.check_fsdp(False, 2, "isp")
    checks.check_schedule("1F1B", 4, 2, 8)
    checks.check_schedule("ZBV", 2, 2, 1)
    checks.check_layer_split(4, 2, [3, 1])
    assert checks.check_world(12, pipeline=2, tensor=3) == 2


def test_arguments_get_other_names() -> None:
    with pytest.raises(LayoutError) as caught:
        checks.check_weight(2, "mtp")
    named = caught.value.named({"weight": "parallel.weight.size", "mode": "parallel.tensor.mode"})
    assert named.startswith("parallel.weight.size = 2 needs parallel.tensor.mode = 'isp', which is mtp")


def test_a_layout_refuses_a_weight_degree_that_its_mode_ignores() -> None:
    with pytest.raises(LayoutError, match="weight = 2 needs mode = 'isp'"):
        ParallelLayout(world_size=2, weight=2, mode="mtp")
