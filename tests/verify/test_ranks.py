"""Ranks that fail end all of them within seconds, and the first cause is told."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest

from internlm.utils.errors import ConfigError
from internlm.verify.case import Case, Combination, changed
from internlm.verify.ranks import LocalRanks, RankFailedError

LIMIT_SECONDS = 30.0

# As a user registers a model; what it does wrong is done on the last rank in its first forward pass.
MODEL = """
import os as _os, signal as _signal
import torch.distributed as _dist
from internlm.model.families.internlm2 import internlm2 as _internlm2
from internlm.model.registry import register_model as _register_model
from internlm.utils.errors import DataError as _DataError

@_register_model("TRAPPED")
def _trapped(config, norm_dtype):
    model = _internlm2(config, norm_dtype)
    def trap(module, arguments):
        if _dist.is_initialized() and _dist.get_rank() == _dist.get_world_size() - 1:
            {action}
    model.register_forward_pre_hook(trap)
    return model
"""


def trapped(folder: Path, action: str, text: str) -> tuple[Case, Path]:
    """A case whose model fails, and the file that registers it."""
    path = folder / "config.py"
    path.write_text(MODEL.replace("{action}", action), encoding="utf-8")
    case = Combination.parse(text).case()
    return Case(changed(case.config, {"model_type": "TRAPPED"}), case.world_size), path


@pytest.mark.parametrize("text", ["ranks=2", "ranks=4 layout:pipeline=2"])
def test_an_exception_is_told_with_its_traceback_and_ends_all(text: str, tmp_path: Path) -> None:
    case, path = trapped(tmp_path, 'raise RuntimeError("the trap has sprung")', text)
    with LocalRanks(case.world_size, path) as ranks:
        started = time.monotonic()
        with pytest.raises(RankFailedError) as caught:
            ranks.run(case, 1)
        assert time.monotonic() - started < LIMIT_SECONDS
        last = case.world_size - 1
        assert str(caught.value).splitlines()[-1] == f"rank {last} failed: RuntimeError: the trap has sprung"
        assert "Traceback" in str(caught.value)
        # The next case gets ranks of its own.
        ranks.run(Combination.parse(text).case(), 1)


def test_a_killed_rank_is_named_and_ends_all(tmp_path: Path) -> None:
    case, path = trapped(tmp_path, "_os.kill(_os.getpid(), _signal.SIGKILL)", "ranks=2")
    started = time.monotonic()
    with LocalRanks(2, path) as ranks, pytest.raises(RankFailedError, match=r"rank 1 ended .* exit code -9"):
        ranks.run(case, 1)
    assert time.monotonic() - started < LIMIT_SECONDS


def test_a_mistake_of_the_user_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its ranks leave no file behind."""
    case, path = trapped(tmp_path, 'raise _DataError("no such folder")', "ranks=2")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with LocalRanks(2, path) as ranks, pytest.raises(ConfigError, match="no such folder"):
        ranks.run(case, 1)
    assert list((tmp_path / "temporary").glob("internlm-verify-*")) == []
