"""The committed results: they have our times, and the order of the GPU's backends, which is held in
llmops/backends/_measured.py, is what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llmops
from llmops.backends import _measured, cuda, triton
from llmops.dispatch import Call

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
RMS = {"rms_norm", "add_rms_norm"}  # by their kernels, which are the layer norms'


def elements(shape: str) -> int:
    """Of the first tensor: "bandwidth 512x768", "1x9+3x512x64" (9 heads of q, 3 of k)."""
    return math.prod(int(part.split("+")[0]) for part in shape.split(" ")[-1].split("x"))


def small(row: dict[str, Any]) -> bool:
    op, size = row["op"], getattr(torch, row["dtype"]).itemsize
    aligned = op not in _measured.ALIGNED or int(row["shape"].split("x")[-1]) * size % 16 == 0
    return aligned and elements(row["shape"]) <= _measured.UP_TO[op]


def test_measured_order_is_that_of_the_results() -> None:
    seen = set()
    for file in RESULTS.glob("cuda-*.json"):
        runs = json.loads(file.read_text())["runs"]
        for row in (row for run in runs for row in run["rows"] if row["op"] in _measured.UP_TO):
            times = {result["provider"]: result["us"] for result in row["results"]}
            if "llmops cuda" in times and small(row):
                what = f"{row['op']} {row['passes']} {row['dtype']} {row['shape']}"
                assert times["llmops cuda"] < times["llmops"], f"{what}: {times}"
                seen.add((row["op"], row["dtype"], row["passes"]))
    for op in _measured.UP_TO.keys() - RMS:
        for dtype in ("float32", "bfloat16"):
            for passes in ("fwd", "bwd"):
                assert (op, dtype, passes) in seen, f"{op} {dtype} {passes} was not measured"


def test_results_have_a_time_of_ours_in_each_row() -> None:
    """A row that has none found our result wrong, or did not run."""
    files = sorted(RESULTS.glob("*.json"))
    assert files
    for file in files:
        for run in json.loads(file.read_text())["runs"]:
            for row in run["rows"]:
                what = f"{file.name}: {row['op']} {row['passes']} {row['dtype']} {row['shape']}"
                notes = [result["note"] for result in row.get("results", ())]  # older files: none
                assert row["ours_us"], f"{what} has no time of ours: {notes}"


def test_measured_sizes() -> None:
    def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
        return SimpleNamespace(
            is_cuda=True,
            shape=shape,
            numel=lambda: math.prod(shape),
            element_size=lambda: dtype.itemsize,
        )

    given = _measured.size_of("layer_norm", on_gpu(2048, 4096))
    assert given == (_measured.SMALL,) and _measured.size_of("layer_norm", on_gpu(2049, 4096)) == ()
    assert _measured.size_of("layer_norm", torch.ones(2, 3)) == (), "of a GPU alone"
    assert _measured.size_of("rope_qk_", on_gpu(2, 3)) == (), "not measured"
    odd = on_gpu(2, 50257, dtype=torch.bfloat16)
    assert _measured.size_of("cross_entropy", odd) == () != _measured.size_of("rope", odd)


@pytest.mark.parametrize("op", sorted(_measured.UP_TO))
def test_measured_ops_have_both(op: str) -> None:
    """No entry of the table is of an op that one of the two lacks."""
    assert op in llmops.OPERATORS
    for backend in (triton, cuda):
        call = Call(op, backend.DEVICE, torch.bfloat16, (_measured.SMALL,))
        assert backend.serves(call) is None
