"""The backends: modules with same-named raw functions and `available()`: can it run here;
`serves(call)`: has it a kernel; `supports(call)`: both; `describe(call)`. They are imported on
first use, so that `import llmops` needs none of them."""

from __future__ import annotations

import importlib
from types import ModuleType

_loaded: dict[str, ModuleType] = {}
# The module of a name; "reference" is the specification itself, wearing a backend's face.
_MODULES = {"cpu": "cpu", "cuda": "cuda", "triton": "triton", "reference": "plain"}


def get(name: str) -> ModuleType:
    module = _loaded.get(name)
    if module is None:
        module = _loaded[name] = importlib.import_module(f"llmops.backends.{_MODULES[name]}")
    return module
