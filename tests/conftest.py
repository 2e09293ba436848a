"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from helpers.ranks import RankPool
from helpers.s3 import bucket, s3_server  # noqa: F401

from internlm.utils.logging import ROOT_LOGGER

# How long an example takes says more about what else the machine does than about the code.
hypothesis.settings.register_profile("tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tests")

# A full collection walks through the objects of thousands of tests, which takes seconds; in a forked process it also
# copies every page it touches. All that exists before the tests, or before a fork, lives on: leave it out.
os.register_at_fork(after_in_child=gc.freeze)


def pytest_collection() -> None:
    """Collect no garbage while tests are collected: there is little."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave the tests and the modules they import out of later collections."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors are faster on one thread, and forked ranks inherit it."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logger_as_imported() -> Iterator[None]:
    """A command that a test runs in this process configures the project's logger; the next test must not see that."""
    yield
    logger = logging.getLogger(ROOT_LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n).run(function, *args)` runs a function on n gloo ranks."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        return pools.setdefault(world_size, RankPool(world_size))

    yield pool
    for started in pools.values():
        started.close()
