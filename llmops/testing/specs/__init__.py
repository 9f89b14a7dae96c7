"""The samples of each operator, one module each."""

from __future__ import annotations

import importlib
import pkgutil

from llmops.testing._core import OpSpec


def every() -> dict[str, OpSpec]:
    """Every OpSpec of these modules, by the operator's name."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        values = vars(importlib.import_module(f"{__name__}.{module.name}")).values()
        found.update({v.name: v for v in values if isinstance(v, OpSpec)})
    return dict(sorted(found.items()))
