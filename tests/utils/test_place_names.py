"""Messages name what a local copy is of."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from internlm.utils import place_names
from internlm.utils.errors import DataError, user_message
from internlm.utils.logging import configure_logging, get_logger
from internlm.utils.place_names import name_place, with_place_names


@pytest.fixture(autouse=True)
def _names() -> Iterator[None]:
    name_place(re.escape("/a b/copy"), "s3://bucket/x\\1")
    yield
    place_names._names.clear()
    place_names._compiled.clear()
    logger = logging.getLogger("internlm")
    logger.handlers.clear()
    logger.propagate = True


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("/a b/copy/en/a.bin: bad", "s3://bucket/x\\1/en/a.bin: bad"),
        ("'/a b/copy', in /a b/copy.", "'s3://bucket/x\\1', in s3://bucket/x\\1."),
        ("/a b/copy.bin /a b/copy-2 /a b/copy2", "/a b/copy.bin /a b/copy-2 /a b/copy2"),
    ],
)
def test_whole_components_are_replaced(message: str, shown: str) -> None:
    assert with_place_names(message) == shown
    assert str(DataError(message)) == shown


def test_errors_of_the_system_and_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    assert user_message(OSError(2, "No such file", "/a b/copy/x")) == "s3://bucket/x\\1/x: No such file"
    configure_logging()
    get_logger().info("%s: ignored", "/a b/copy/x")
    assert "s3://bucket/x\\1/x: ignored" in capfd.readouterr().err
