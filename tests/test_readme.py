"""README.md: its example runs as printed, its generated parts are what the code says."""

from __future__ import annotations

import importlib.util
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


def test_readme_model_table_has_tokens_per_second() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    assert spec is not None and spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    row = {
        "op": "model", "shape": "GPT-2, 128 tokens", "passes": "prefill", "dtype": "float32",
        "ours_us": 64e3, "torch_us": 256e3, "ratio": 4.0,
    }  # fmt: skip
    *_, new, old = readme._model_lines([{**row, "tokens": 128}, row])
    start = "| GPT-2, 128 tokens | prefill | float32 | 64.0 | 256.0 |"
    assert new == f"{start} 2000.0 | 500.0 | 4.00x |"
    assert old == f"{start} – | – | 4.00x |"
