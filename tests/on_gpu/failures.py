"""A plug-in of pytest that writes failures down as they come, so that a run that is ended has told them."""

from __future__ import annotations

from pathlib import Path

import pytest


class Failures:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self._path.open("a") as log:
                log.write(f"{report.nodeid}\n{report.longreprtext}\n\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures", type=Path, help="the file to write them into")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--failures")
    if path is not None and not hasattr(config, "workerinput"):  # whose reports come here
        config.pluginmanager.register(Failures(path))
