"""Weights stay as they are under float8: a run that resumes goes on with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.configs import small_config
from helpers.ranks import RankPool
from helpers.resume import SAVED_STEP, leave_and_resume

from internlm.verify.case import Case

FLOAT8 = {
    "model.hidden_size": 64,
    "model.num_layers": 3,
    "model.intermediate_size": 96,
    "model.dtype": "torch.bfloat16",
    "data.micro_num": 2,
    "float8.enable_float8_linear": True,
}


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, {}), (2, {"parallel.tensor.mode": "isp", "parallel.weight.size": 2, "parallel.weight.overlap": True})],
    ids=["one process", "isp"],
)
def test_resuming_is_exact(
    world_size: int, layout: dict[str, Any], ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    case = Case(small_config({**FLOAT8, **layout}), world_size)
    for result in ranks(world_size).run(leave_and_resume, case, str(tmp_path), str(tmp_path / str(SAVED_STEP))):
        assert result.differences == []
