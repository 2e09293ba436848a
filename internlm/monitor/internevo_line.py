"""The numbers of a step in the format of InternEvo's log line, for programs that parse its logs.

Names, order and rounding are InternEvo's; doc/quickstart.md lists the numbers with another meaning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

PREFIX = "record_current_batch_training_metrics -- "
"""Start of the message; in InternEvo, the name of the logging function."""

_TGS = "tgs (tokens/gpu/second)"
_WINDOWS = ("last_tgs_1", "tgs_all", "tgs_avg", "tgs_SMA", "last_tgs_10", "last_tgs_50")
_COUNTS = (
    "micro_num", "num_consumed_tokens", "inf_nan_skip_batches", "num_samples_in_batch", "largest_length",
    "largest_batch", "smallest_batch",
)  # fmt: skip


def internevo_line(numbers: Mapping[str, float | str]) -> str:
    """`name=value` for each number, each followed by a space.

    Args:
        numbers: those of `MetricsCollector.numbers`, for a step whose update was not skipped.
    """
    return PREFIX + "".join(f"{name}={value} " for name, value in _fields(numbers))


def _fields(numbers: Mapping[str, float | str]) -> Iterator[tuple[str, Any]]:
    def number(name: str, default: float = math.nan) -> float:
        return float(numbers.get(name, default))

    yield "tflops", number("tflops_full", number("tflops"))
    yield "step", int(number("step")) - 1
    yield "loss", number("loss", 0.0)
    yield "real_tgs", round(number("real_tgs"), 2)
    yield _TGS, round(number("tgs"), 2)
    for window in _WINDOWS:
        yield f"tgs/{window}", round(number(f"tgs/{window}"), 2)
    yield "lr", number("lr")
    yield "loss_scale", number("loss_scale")
    yield "grad_norm", {"0_default": number("grad_norm")}
    for name in _COUNTS:
        yield name, int(number(name))
    yield "adam_beta2", number("adam_beta2")
    yield "fwd_bwd_time", round(number("fwd_bwd_time"), 2)
    yield "acc", round(number("acc"), 4)
    yield "perplexity", round(number("perplexity"), 4)
    types = [name.removeprefix("tokens/") for name in numbers if name.startswith("tokens/")]
    for kind in types:
        yield f"acc/{kind}", round(number(f"acc/{kind}", 0.0), 4)
    for kind in types:
        yield f"tokens/{kind}", int(number(f"tokens/{kind}"))
    yield "loss_from_metric", round(number("loss_from_metric"), 4)
    for kind in types:
        yield f"loss/{kind}", round(number(f"loss/{kind}"), 4)
