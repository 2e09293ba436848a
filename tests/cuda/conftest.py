"""Failures are printed as they happen: a run on a GPU that is lent for minutes may be ended before pytest sums up."""

from __future__ import annotations

from typing import Any

import pytest


class PrintFailures:
    """Prints the traceback of a failed test as soon as it is known."""

    def __init__(self, terminal: Any) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.write_line(f"\n{report.nodeid}\n{report.longreprtext[-4000:]}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Processes of pytest-xdist have no terminal; theirs is that of the process that started them."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        config.pluginmanager.register(PrintFailures(terminal))
