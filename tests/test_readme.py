"""README.md: its example runs as printed, its generated parts are what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_example_runs_as_printed(tmp_path: Path) -> None:
    example = re.search(r"## Example\n\n```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", example.group(1)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "torch.Size([2, 8, 256, 64])" in result.stdout
    assert "served by cpu" in result.stdout


def test_readme_generated_parts_are_current() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "readme.py"), "--check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_readme_names_what_exists() -> None:
    for name in re.findall(r"`((?:llmops|csrc|benchmarks)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), f"README.md names {name}"
