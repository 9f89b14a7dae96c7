"""How a module is replaced: its class becomes a subclass whose forward calls our operator.

The instance stays: parameters, buffers, hooks, its place in the model and `isinstance` are as they
were, and the state dict has the same keys. The subclass is made from the module's own class and a
mixin; pickle and deepcopy store the two names and make it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

_made: dict[tuple[type, type], type] = {}


class Replaced:
    """A mixin's base: in front of the module's own class, whose forward it replaces and may call
    (`super().forward`) for an input that is not ours to serve."""

    _llmops_original: type
    _llmops_mixin: type

    def _get_name(self) -> str:  # what repr shows; __name__ stays, since libraries go by it
        return f"{self._llmops_original.__name__}[llmops]"

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        rest = reduced[2:]
        return (_rebuild, (self._llmops_original, self._llmops_mixin), *rest)


def _rebuild(original: type, mixin: type) -> Any:
    made: Any = _class(original, mixin)
    return made.__new__(made)


def _class(original: type, mixin: type) -> type:
    key = (original, mixin)
    if key not in _made:
        _made[key] = type(
            original.__name__,
            (mixin, original),
            {
                "_llmops_original": original,
                "_llmops_mixin": mixin,
                "__module__": original.__module__,
                "__qualname__": original.__qualname__,
                "__doc__": original.__doc__,
            },
        )
    return _made[key]


def why_not(module: nn.Module, base: type) -> str | None:
    """What stands in the way of a replacement whose mixin stands for `base`'s forward."""
    cls = type(module)
    if cls.forward is not base.forward:  # type: ignore[attr-defined]
        return f"{cls.__name__} has a forward of its own"
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        return f"{cls.__name__} is pickled in a way of its own"
    if is_parametrized(module):
        return "it is parametrized, which is by its class, too"
    own = module.__dict__.get("forward")
    if own is not None and not _is_accelerates(module):
        return "its forward was replaced on the instance by other code"
    return None


def swap(module: nn.Module, mixin: type, state: Mapping[str, Any] | None = None) -> None:
    """`state`: attributes that the mixin reads; their names begin with _llmops_."""
    before = type(module)
    module.__class__ = _class(before, mixin)
    module.__dict__.update(state or {})
    _rebind(module, before.forward)


def is_replaced(module: nn.Module) -> bool:
    return isinstance(module, Replaced)


def restore(module: nn.Module) -> bool:
    """True where the module had been replaced, and has still the class that it was given then."""
    before = type(module)
    if not isinstance(module, Replaced) or before not in _made.values():
        return False
    module.__class__ = module._llmops_original
    for name in [n for n in module.__dict__ if n.startswith("_llmops_")]:
        del module.__dict__[name]
    _rebind(module, before.forward)  # type: ignore[attr-defined]
    return True


def _is_accelerates(module: nn.Module) -> bool:
    """accelerate's hooks put a function on the instance that calls `_old_forward`."""
    return "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__


def _rebind(module: nn.Module, before: Any) -> None:
    """accelerate's hook then calls the forward of the class that the module has now."""
    if _is_accelerates(module):
        old = module.__dict__["_old_forward"]
        if getattr(old, "__func__", None) is before:
            module.__dict__["_old_forward"] = type(module).forward.__get__(module)
