"""Report: what patch() replaced, and what it left alone and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A module of the model, or its attention or loss, which are no modules."""

    name: str  # as in named_modules; "" is the model itself
    kind: str  # the class, or "attention", "loss"
    op: str | None = None  # the operator that computes it now; None: left alone
    reason: str = ""  # why it was left alone, or how a replacement differs
    speedup: float | None = None  # dry_run: its time over the operator's


@dataclass
class Report:
    """`replaced` and `left` together name every module of the model; printing tells both.

    Attributes:
        replaced, left: the entries.
        notes: what concerns the whole, such as a version of a library that was not tested.
        dry_run: nothing was changed, and the entries of `replaced` hold measured speedups.
        undone: it is unpatch's.
    """

    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False
    undone: bool = False

    def __str__(self) -> str:
        what = "patch would replace" if self.dry_run else "patch replaced"
        what = "unpatch restored" if self.undone else what
        total = len(self.replaced) + len(self.left)
        lines = [f"llmops.{what} {len(self.replaced)} of {total}:"]
        lines += [f"  {line}" for line in self._grouped(self.replaced)] or ["  nothing"]
        if self.left:
            lines += ["left alone:", *(f"  {line}" for line in self._grouped(self.left))]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    @staticmethod
    def _grouped(entries: list[Entry]) -> Iterator[str]:
        groups: dict[tuple[Any, ...], list[Entry]] = {}
        for entry in entries:
            groups.setdefault((entry.kind, entry.op, entry.reason), []).append(entry)
        for (kind, op, reason), group in groups.items():
            names = ", ".join(e.name or "(the model)" for e in group[:3])
            if len(group) > 3:
                names += f", and {len(group) - 3} more"
            line = f"{len(group)} x {kind}" + (f" -> {op}" if op else "")
            times = [e.speedup for e in group if e.speedup is not None]
            if times:
                line += f", {sum(times) / len(times):.1f}x as fast"
            yield f"{line}: {reason + ': ' if reason else ''}{names}"
