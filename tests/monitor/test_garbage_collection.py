"""The collector runs at the chosen steps only, and is given back."""

from __future__ import annotations

import gc

import pytest
from helpers.fake_trainer import FakeTrainer

from internlm.core.hooks import Hook
from internlm.monitor.garbage_collection import GarbageCollectionHook


@pytest.fixture(autouse=True)
def collector_on():
    gc.enable()
    gc.freeze()  # the objects of earlier tests, so that a collection is short
    yield
    gc.enable()


class Watch(Hook):
    """Notes at each step whether the collector is on, and whether it ran since the step before."""

    def __init__(self) -> None:
        self.enabled: list[bool] = []
        self.collections: list[int] = []

    def on_step_counted(self, trainer):
        self.enabled.append(gc.isenabled())
        self.collections.append(gc.get_stats()[2]["collections"])


def test_collects_at_the_chosen_steps_only(tmp_path):
    watch = Watch()
    FakeTrainer(tmp_path, [GarbageCollectionHook(3), watch], total_steps=7).fit()
    ran = [later - earlier for earlier, later in zip(watch.collections, watch.collections[1:], strict=False)]
    assert ran == [0, 1, 0, 0, 1, 0]  # at steps 3 and 6
    assert watch.enabled == [False] * 7
    assert gc.isenabled()


def test_given_back_after_an_exception(tmp_path):
    with pytest.raises(RuntimeError):
        FakeTrainer(tmp_path, [GarbageCollectionHook(1)]).fit(fail_at=2)
    assert gc.isenabled()


def test_stays_off_where_the_caller_had_it_off(tmp_path):
    gc.disable()
    FakeTrainer(tmp_path, [GarbageCollectionHook(1)]).fit()
    assert not gc.isenabled()


def test_zero_leaves_python_alone(tmp_path):
    watch = Watch()
    FakeTrainer(tmp_path, [GarbageCollectionHook(0), watch]).fit()
    assert watch.enabled == [True] * 4
