"""The Triton norms where rows do not fit registers, forced by short limits."""

from __future__ import annotations

import os

import pytest
import torch

from llmops.testing import Make, Target
from llmops.testing._checks import CHECKS
from llmops.testing.specs import layer_norm, rms_norm

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

SPECS = (rms_norm.SPEC, rms_norm.SPEC_ADD, layer_norm.SPEC, layer_norm.SPEC_ADD)
WANTED = ("5x129", "3x40-none", "fp32-residual-7x80", "outliers-first-4x200")


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_norm_long_rows(
    spec: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmops.kernels.triton import _config, _norm_bwd, _rows

    monkeypatch.setattr(_rows, "LONGEST", 16)
    monkeypatch.setattr(_norm_bwd, "LONGEST_BACKWARD", 16)
    names = ("layer_norm", "layer_norm_bwd", "rms_norm", "rms_norm_bwd")
    monkeypatch.setattr(_config, "_overrides", {name: {"BLOCK": 64} for name in names})
    for sample in spec.samples(Make(dtype)):
        if sample.id in WANTED:
            for check in ("matches_reference", "gradients"):
                CHECKS[check](spec, sample, Target("triton", "cpu"))
