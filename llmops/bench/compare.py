"""`llmops bench --compare old.json`: what moved beyond noise since then.

A row moved when both ours in microseconds and the ratio to torch, which ran beside it, changed by
more than the noise: the first alone is what a busier machine does, the second alone is a change of
torch's side. The noise is twice the quartile distances of both runs together, at least 5 % (where
one run has no quartiles, 5 %). Across machines only ratios are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmops.bench.measure import Row, from_json

FLOOR = 0.05


@dataclass
class Move:
    row: Row
    old: Row
    time: float  # new over old of ours, above 1: slower
    ratio: float  # new over old of the ratio to torch, below 1: slower
    noise: float
    verdict: str  # "slower", "faster" or "same"


def rows_of(result: dict[str, Any]) -> list[Row]:
    """Those of the run with torch as it comes; files before format 2 have one run only."""
    runs = result.get("runs") or [{"rows": result["rows"]}]
    plain = [run for run in runs if not run.get("torch_huge_pages")]
    return [from_json(row) for run in plain for row in run["rows"]]


def compare(old: Iterable[Row], new: Iterable[Row], same_machine: bool = True) -> list[Move]:
    """A Move for each row of both runs that has a number in both."""
    before = {row.key: row for row in old}
    moves = []
    for row in new:
        was = before.get(row.key)
        if was is None or not (row.ours_us and was.ours_us and row.ratio and was.ratio):
            continue
        time, ratio = row.ours_us / was.ours_us, row.ratio / was.ratio
        noise = max(FLOOR, 2 * math.hypot(_spread(row), _spread(was)))
        slower = ratio < 1 / (1 + noise) and (time > 1 + noise or not same_machine)
        faster = ratio > 1 + noise and (time < 1 / (1 + noise) or not same_machine)
        verdict = "slower" if slower else "faster" if faster else "same"
        moves.append(Move(row, was, time, ratio, noise, verdict))
    return moves


def _spread(row: Row) -> float:
    """The relative noise of ours and torch's time together."""
    sides = [r.iqr_us / r.us for r in row.results if r.us and r.provider in ("llmops", "torch")]
    return math.hypot(*sides) if sides else 0.0


def report(
    result: dict[str, Any], new: list[Row], machine: dict[str, Any]
) -> tuple[list[str], bool]:
    """Lines to print, and whether anything regressed: slower, or without a number now."""
    was = result["machine"]
    same = all(was.get(k) == machine.get(k) for k in ("cpu", "isa"))
    old = rows_of(result)
    moves = compare(old, new, same)
    lines = [
        f"Compared with commit {was.get('commit')}, {was.get('cpu')}, torch {was.get('torch')}:"
    ]
    if not same:
        lines.append("  another machine: only the ratios to torch are compared")
    for move in sorted(moves, key=lambda m: m.ratio):
        if move.verdict != "same":
            row = move.row
            lines.append(
                f"  {move.verdict}: {row.op} {row.passes} {row.dtype} {row.shape}: "
                f"{move.old.ours_us:.1f} -> {row.ours_us:.1f} us, "
                f"{move.old.ratio:.2f}x -> {row.ratio:.2f}x of torch (noise {move.noise:.0%})"
            )
    had = {row.key for row in old if row.ours_us}
    lost = [row for row in new if row.key in had and not row.ours_us]
    lines += [f"  lost its number: {r.op} {r.passes} {r.dtype} {r.shape}: {r.wrong}" for r in lost]
    counts = {v: sum(m.verdict == v for m in moves) for v in ("slower", "faster", "same")}
    unmatched = len({row.key for row in new} - {row.key for row in old})
    lines.append(
        f"  {counts['slower']} slower, {counts['faster']} faster, {counts['same']} within noise, "
        f"{unmatched} not in the old file"
    )
    return lines, bool(counts["slower"] or lost)
