"""patch(): a model that exists already, on the operators of this library; unpatch() takes it back.

Modules are replaced one by one, by class (`_rules.py` has torch's, `llmops/integrations/` those of
other libraries); what cannot be, stays, and the report says why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from llmops.integrations.patch import _behaviour, _measure, _swap
from llmops.integrations.patch._report import Entry, Report
from llmops.integrations.patch._rules import TORCH, Rule

__all__ = ["Entry", "Report", "patch", "unpatch"]

# Operators that a patch can bring in: the names that `ops` takes.
OPS = (
    "attention",
    "cross_entropy",
    "embedding",
    "geglu",
    "gelu",
    "layer_norm",
    "linear",
    "rms_norm",
    "softmax",
    "swiglu",
)


def patch(model: nn.Module, *, ops: Iterable[str] | None = None, dry_run: bool = False) -> Report:
    """Replaces, in place, the modules of a model that this library computes faster.

    The model stays the same object with the same parameters, state dict, hooks and results (within
    rounding); forward, backward, `generate`, torch.compile, export, pickle and deepcopy work as
    before. A module that is not known, or does not compute what its replacement would, is left
    alone. Patching a patched model again changes nothing.

    Args:
        model: torch.nn modules, and models of transformers and timm.
        ops: operators to bring in, e.g. ("attention", "rms_norm"); None: all of them.
        dry_run: change nothing, and print what would change, with the gain measured here and now
            on inputs of each module's own size.

    Returns:
        Report: `replaced` and `left`, each an Entry with its reason; printing it tells it all.

    Raises:
        TypeError: model is no torch.nn.Module. ValueError: an unknown name in `ops`.

    >>> print(llmops.patch(model))
    """
    _check(model, "patch")
    wanted = set(OPS if ops is None else ([ops] if isinstance(ops, str) else ops))
    unknown = sorted(wanted - set(OPS))
    if unknown:
        raise ValueError(f"llmops.patch: ops may name {', '.join(OPS)}; got {unknown[0]!r}")
    report = Report(dry_run=dry_run)
    hidden: dict[int, str] = {}
    found: list[tuple[nn.Module, Rule]] = []
    for name, module in model.named_modules():
        rule = _rule(module, wanted, hidden)
        kind = type(module).__name__
        if isinstance(rule, str):
            report.left.append(Entry(name, kind, reason=rule))
            continue
        for child in rule.hides:
            part = getattr(module, child, None)
            if isinstance(part, nn.Module):
                hidden[id(part)] = f"its {kind} computes it within {rule.op}"
        speedup = _measure.module(module, rule) if dry_run else None
        report.replaced.append(Entry(name, kind, rule.op, rule.note, speedup))
        found.append((module, rule))
    if not dry_run:
        for module, rule in found:
            _swap.swap(module, rule.mixin, rule.state)
    if (hf := _transformers()) is not None:
        hf.patch_model(model, wanted, report)
    if dry_run:
        print(report)
    return report


def unpatch(model: nn.Module) -> Report:
    """Takes back what patch() did to this model, or to parts of it: the modules have the classes
    they had, the configuration is the object it was.

    Returns:
        Report, whose `replaced` names what was restored, and `left` what could not be.
    """
    _check(model, "unpatch")
    report = Report(undone=True)
    for name, module in model.named_modules():
        kind = type(module).__name__
        if not _swap.is_replaced(module):
            continue
        if _swap.restore(module):
            report.replaced.append(Entry(name, kind, "its own"))
        else:
            reason = "its class was changed after the patch, by a parametrization, say"
            report.left.append(Entry(name, kind, reason=f"{reason}; take that back first"))
    if (hf := _transformers()) is not None:
        hf.unpatch_model(model, report)
    return report


def _check(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"llmops.{function}: model must be a torch.nn.Module; got {type(model).__name__}"
        )


def _rule(module: nn.Module, wanted: set[str], hidden: dict[int, str]) -> Rule | str:
    """The rule that replaces this module, or why none does."""
    if isinstance(module, _swap.Replaced):
        return "patched already"
    if id(module) in hidden:
        return hidden[id(module)]
    for rule in _rules():
        if not isinstance(module, rule.base):
            continue
        reason = _swap.why_not(module, rule.base) or rule.unless(module)
        if reason is None and rule.op not in wanted:
            reason = f"ops does not name {rule.op}"
        return rule if reason is None else reason
    found: Rule | str | None = None
    if (hf := _transformers()) is not None:
        found = hf.rule(module)
    found = found or _behaviour.rule(module)
    if isinstance(found, Rule) and found.op not in wanted:
        return f"ops does not name {found.op}"
    if found is not None:
        return found
    if next(module.children(), None) is not None:
        return "what it computes itself has no operator here; its parts are listed"
    return "no operator here computes it"


def _rules() -> Iterator[Rule]:
    if "timm.layers" in sys.modules:
        from llmops.integrations import timm

        yield from timm.rules()
    yield from TORCH


def _transformers() -> Any:
    """Our side of transformers, where that is loaded: a model of it is then possible."""
    if "transformers" not in sys.modules:
        return None
    from llmops.integrations import transformers

    return transformers
