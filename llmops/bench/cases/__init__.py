"""The cases of each op, one same-named module with `cases(quick)` each; beside them overhead (per
call), scaling (over rows), attention_grid (flash-attention's), model (whole models) and patched
(transformers' models, patched and not). Where they are named, model_long (larger ones) and
bandwidth (row ops at a GPU's sizes)."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Sequence

import torch

from llmops.bench.harness import Case

DTYPES = ("float32", "bfloat16", "float16")
# Cheap and telling ones first: a run that is cut short by its time has these.
LAST = ("model", "patched", "linear_cross_entropy", "attention_grid")
# Not part of a run that names nothing: minutes per row, or for a GPU.
ONLY_NAMED = ("model_long", "bandwidth")


def names() -> list[str]:
    found = sorted(m.name for m in pkgutil.iter_modules(__path__))
    return [n for n in found if n not in LAST + ONLY_NAMED] + list(LAST)


def known() -> list[str]:
    """All that may be named."""
    return [*names(), *ONLY_NAMED]


def collect(
    ops: Sequence[str] = (),
    quick: bool = False,
    dtypes: Sequence[str] = (),
    device: str = "cpu",
) -> Iterator[Case]:
    """Cases of these ops (all where none is named); `quick` keeps one shape of each."""
    for name in ops or names():
        if name not in known():
            raise ValueError(f"llmops bench: no cases for {name!r}; there are {', '.join(known())}")
        module = importlib.import_module(f"llmops.bench.cases.{name}")
        torch.manual_seed(0)
        found = module.cases(quick)
        while True:
            # Only while it makes its inputs: what is measured must not run under a mode.
            with torch.device(device) if device != "cpu" else torch.random.fork_rng(enabled=False):
                case = next(found, None)
            if case is None:
                break
            case.device = device
            if not dtypes or case.dtype_name in dtypes:
                yield case
