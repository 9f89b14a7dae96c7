"""The specs of the kit: on a GPU nothing of them may be left on the CPU, and what they allow beyond
the error rule hides nothing."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmops.testing import Make, OpSpec, Target, specs
from llmops.testing._core import expected, gradient_floors, result_floors

# Between devices: copies, and an index, which may lie on the CPU.
MAY_MIX = ("copy_", "aten.index.Tensor", "aten.index_put")
# These read lengths back from the device, which a meta tensor has not.
READ_BACK = ("attention_kvcache", "attention_varlen")


class OneDevice(TorchDispatchMode):
    """Raises where an operation is given tensors of the CPU and of another device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in given if t.dim() or t.device.type != "cpu"}
        if len(devices) > 1 and not any(name in str(func) for name in MAY_MIX):
            raise AssertionError(f"{func} of {[(*t.shape, t.device.type) for t in given]}")
        return func(*args, **(kwargs or {}))


def every() -> Iterator[OpSpec]:
    found: dict[str, OpSpec] = {}
    for module in pkgutil.iter_modules(specs.__path__):
        values = vars(importlib.import_module(f"{specs.__name__}.{module.name}")).values()
        found |= {v.name: v for v in values if isinstance(v, OpSpec)}
    yield from (spec for name, spec in found.items() if name not in READ_BACK)


@pytest.mark.parametrize("spec", [*every()], ids=lambda s: s.name)
def test_specs_compute_on_the_samples_device(spec: OpSpec) -> None:
    """With tensors of the meta device for those of a GPU: the oracle and the yardstick of each."""
    with OneDevice(), torch.no_grad():
        for sample in spec.samples(Make(torch.float32, "meta")):
            for fn in (spec.torch_fn, spec.reference):
                try:
                    fn(*sample.args, **sample.kwargs)
                except RuntimeError as error:
                    if "on meta tensors" not in str(error):  # of the few that look at values
                        raise


def test_specs_device_check_can_fail() -> None:
    mixed = OpSpec(
        "mixed", lambda x: x, lambda x: x + torch.ones(3), lambda x: x,
        lambda make: [],
    )  # fmt: skip
    with OneDevice(), pytest.raises(AssertionError, match="aten.add.Tensor"):
        mixed.reference(torch.empty(3, device="meta"))


@pytest.mark.parametrize("name", ["attention", "attention_kvcache", "attention_varlen"])
def test_specs_floors_hide_no_narrower_product(name: str) -> None:
    """What fp32 may be off by beyond the rule stays far below what a product in bf16 (2^-9) or
    TF32 (2^-11) would do to the largest value."""
    spec = importlib.import_module(f"llmops.testing.specs.{name}").SPEC
    seen = 0
    for sample in spec.samples(Make(torch.float32)):
        results, gradients = expected(spec, sample)[0]
        own, of_gradients = result_floors(spec, sample, len(results)), []
        if gradients:
            of_gradients = gradient_floors(spec, sample, Target("cpu", "cpu"))
        pairs = zip([*own, *of_gradients], [*results, *gradients], strict=True)
        for floor, value in pairs:
            largest = value.masked_fill(value.isinf(), 0.0).abs().nan_to_num(0.0)
            if largest.any():
                assert float(floor.max() / largest.max()) < 2.0**-15, sample.id
                seen += 1
    assert seen > 10
