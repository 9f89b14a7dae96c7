"""pytest as `make gpu` runs it: it says why a test failed as soon as it has, for its process may be
killed before pytest's own summary; ends the process where CUDA is in an error state, in which each
later test would fail as well; and runs the tests in an order of no meaning, so that what fits into
the time is some of every check and sample.
"""

from __future__ import annotations

import os
import sys
import zlib
from typing import Any

import pytest

# What torch says of an error that stays: an illegal access, a misaligned one, a failed assertion.
STAYS = "CUDA error"
ENDED = 3  # exit status


class Report:
    def pytest_configure(self, config: Any) -> None:
        self.config = config

    @pytest.hookimpl(trylast=True)  # after all that selects
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))

    @pytest.hookimpl(trylast=True)  # after the verdict
    def pytest_runtest_logreport(self, report: Any) -> None:
        if not report.failed:
            return
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
        reason = lines[0][1:].strip() if lines else report.longreprtext.strip()[-200:]
        writer = self.config.get_terminal_writer()
        writer.line(f"\nREASON {report.nodeid} :: {reason[:300]}")
        writer.flush()
        if STAYS in report.longreprtext:
            os._exit(ENDED)


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as python -m pytest has it
    sys.exit(pytest.main(sys.argv[1:], plugins=[Report()]))
