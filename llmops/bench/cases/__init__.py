"""The cases of each op, one same-named module with `cases(quick)` each."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence

from llmops.bench.harness import Case

DTYPES = ("float32", "bfloat16")


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def collect(ops: Sequence[str] = (), quick: bool = False) -> Iterator[Case]:
    """Cases of these ops (all where none is named); `quick` keeps one shape of each."""
    for name in ops or names():
        if name not in names():
            raise ValueError(f"llmops bench: no cases for {name!r}; there are {', '.join(names())}")
        module = importlib.import_module(f"llmops.bench.cases.{name}")
        yield from module.cases(quick)
