"""The specs of the kit on the samples' device: on a GPU, nothing of them may be left on the CPU."""

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

from llmops.testing import Make, OpSpec, specs

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
