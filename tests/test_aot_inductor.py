"""AOTInductor: a module of every operator, exported, compiled ahead of time, loaded and run."""

from __future__ import annotations

import pytest
import torch

import llmops
from llmops.testing import Make, OpSpec, Sample, specs, targets
from llmops.testing._surroundings import compiled_together

# They have no spec: sample draws, the others write into their arguments.
WITHOUT_SPEC = {"sample", "rope_qk_", "kv_cache_append_"}


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_aot_inductor_runs_every_operator() -> None:
    """One library for all, since the C++ compiler takes its time; the first sample of each: what
    differs from sample to sample is the kernel's, which the kit checks without a compiler."""
    chosen: list[tuple[OpSpec, Sample]] = []
    for spec in specs.every().values():
        chosen.append((spec, next(iter(spec.samples(Make(torch.float32))))))
    assert {s.name for s, _ in chosen} >= set(llmops.OPERATORS) - WITHOUT_SPEC
    compiled_together(chosen, targets()[-1])
