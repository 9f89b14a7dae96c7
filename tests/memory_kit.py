"""How much memory a call takes at its peak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kilobytes(field: str) -> int:
    line = next(x for x in _STATUS.read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1])


def peak_bytes(run: Callable[[], Any]) -> int:
    """Growth of the process's resident memory at its highest during run(), whose result is kept
    until it has been measured. Linux keeps the mark, and resets it where 5 is written."""
    if not _CLEAR.exists():
        pytest.skip("the peak of resident memory is read from Linux's /proc")
    gc.collect()
    before = _kilobytes("VmRSS")
    _CLEAR.write_text("5")
    kept = run()
    peak = _kilobytes("VmHWM")
    del kept
    return (peak - before) * 1024
