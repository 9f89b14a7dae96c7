"""Turns a spec into pytest tests, one per check, parametrized over targets, dtypes and samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmops.testing._checks import CHECKS
from llmops.testing._core import DTYPES, Make, OpSpec, Sample, Target, targets

# Checks of the machinery around a kernel: one target and dtype shows them, on a few samples.
ONCE = ("compiles_fullgraph", "func_grad", "double_backward")
# Samples per check of ONCE; compiling takes a second each.
FEW = 3


def suite(spec: OpSpec) -> dict[str, Callable[..., None]]:
    """Test functions by name, for `globals().update(suite(SPEC))` in a test module."""
    import pytest

    found: dict[str, Callable[..., None]] = {}
    # Made once and shared by all checks and targets; no check changes them.
    made: dict[tuple[str, torch.dtype], list[Sample]] = {}
    for name, check in CHECKS.items():
        if name in spec.skip or (name == "nan_stays_in_row" and not spec.rows):
            continue
        cases = _cases(spec, made, once=name in ONCE)

        def test(target: Target, sample: Sample, check: Any = check) -> None:
            check(spec, sample, target)

        test.__doc__ = check.__doc__
        test.__name__ = f"test_{spec.name}_{name}"
        found[test.__name__] = pytest.mark.parametrize(("target", "sample"), cases)(test)
    if spec.schemas is not None:
        found[f"test_{spec.name}_opcheck"] = _opcheck_test(spec)
    return found


def _cases(
    spec: OpSpec, made: dict[tuple[str, torch.dtype], list[Sample]], once: bool
) -> list[Any]:
    import pytest

    cases = []
    chosen = targets()[-1:] if once else targets()
    for target in chosen:
        for dtype in DTYPES[:1] if once else DTYPES:
            key = (target.device, dtype)
            if key not in made:
                made[key] = list(spec.samples(Make(dtype, target.device)))
            samples = made[key]
            if once:
                samples = samples[:FEW]
            short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
            tag = short[str(dtype).removeprefix("torch.")]
            cases += [pytest.param(target, s, id=f"{target}-{tag}-{s.id}") for s in samples]
    return cases


def _opcheck_test(spec: OpSpec) -> Callable[..., None]:
    import pytest

    assert spec.schemas is not None
    names = sorted(spec.schemas(Make(torch.float32)))

    def test(name: str) -> None:
        """Schema, autograd registration, fake tensors and AOT dispatch, by torch's own opcheck."""
        assert spec.schemas is not None
        operator = getattr(torch.ops.llmops, name).default
        torch.library.opcheck(operator, spec.schemas(Make(torch.float32))[name])

    test.__name__ = f"test_{spec.name}_opcheck"
    return pytest.mark.parametrize("name", names)(test)
