"""The cases of `llmops bench` under pytest-benchmark: pytest benchmarks/.

One benchmark per provider; the group is the row, so that the table sets them side by side.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmops.bench import cases
from llmops.bench.harness import Case, check

CASES = list(cases.collect(quick=True))


@pytest.mark.parametrize("provider", ["llmops", "torch"])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.op}-{c.passes}-{str(c.dtype)[6:]}-{c.shape}"
)
def test_bench(benchmark: Any, case: Case, provider: str) -> None:
    check(case)
    torch.set_num_threads(1)
    benchmark.group = f"{case.op} {case.passes} {str(case.dtype)[6:]} {case.shape}"
    benchmark(case.ours if provider == "llmops" else case.torch)
