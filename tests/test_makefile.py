"""What the Makefile says of itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_makefile_installed_leaves_the_environment_as_it_is(tmp_path: Path) -> None:
    """INSTALLED=1 beside requirements that changed: nothing is installed over what is there."""

    # Not what a make that runs these tests was given.
    given = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "INSTALLED")
    setting = {k: v for k, v in os.environ.items() if k not in given}

    def installs(*more: str) -> bool:
        command = ["make", "-n", "lint", f"VENV={tmp_path}", *more]
        done = subprocess.run(
            command, cwd=ROOT, env=setting, capture_output=True, text=True, check=True
        )
        return "pip install" in done.stdout

    assert installs() and installs("INSTALLED=1")
    (tmp_path / ".ready").touch()
    assert not installs() and not installs("INSTALLED=1")
    os.utime(tmp_path / ".ready", (0, 0))
    assert installs() and not installs("INSTALLED=1")
