"""The cases of `llmops bench` under pytest-benchmark: pytest benchmarks/.

One benchmark per provider; the group is the row, so that the table sets them side by side. Cases
are made when their test runs: all at once would not fit into memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmops.bench import cases
from llmops.bench.harness import Case, check

KEYS = [
    (op, i, str(case)) for op in cases.names() for i, case in enumerate(cases.collect([op], True))
]


def case_at(op: str, index: int) -> Case:
    for i, case in enumerate(cases.collect([op], quick=True)):
        if i == index:
            return case
    raise IndexError(index)


@pytest.mark.parametrize("provider", ["llmops", "torch"])
@pytest.mark.parametrize(
    ("op", "index", "name"), KEYS, ids=[name.replace(" ", "-") for _, _, name in KEYS]
)
def test_bench(benchmark: Any, op: str, index: int, name: str, provider: str) -> None:
    torch.set_num_threads(1)
    case = case_at(op, index)
    benchmark.group = name
    with case.setting():
        check(case)
        benchmark(case.ours if provider == "llmops" else case.torch)
