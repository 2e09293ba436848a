"""What a rank says it is doing."""

from __future__ import annotations

import pytest

from internlm.core.progress.record import Progress


def test_steps_activities_and_phases() -> None:
    progress = Progress()
    assert str(progress) == "start"
    progress.begin_step(3)
    progress.mark("forward of micro-batch 1")
    assert str(progress) == "forward of micro-batch 1, step 3"
    began = progress.began
    with progress.announce("evaluation of 'wiki'"):
        assert str(progress) == "evaluation of 'wiki', step 3"
        progress.mark("forward of micro-batch 0")
        assert str(progress) == "evaluation of 'wiki', forward of micro-batch 0, step 3"
    assert progress.activity == ""
    # What the activity took does not count in the time of the step.
    assert progress.began > began


def test_an_exception_leaves_the_activity_for_the_message() -> None:
    progress = Progress()
    with pytest.raises(ValueError), progress.announce("saving a checkpoint"):
        raise ValueError
    assert str(progress) == "saving a checkpoint"
    progress.begin_step(4)
    assert progress.activity == ""
