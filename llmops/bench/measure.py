"""Times a case: every provider checked against torch first, then all in rotating order.

In round i the providers run in order i, i+1, ... (cyclically), each long enough to be timed well,
so that a machine that slows down slows all of them. Reported are the median and the distance
between the quartiles; a ratio is that of medians.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from llmops import FallbackWarning, dispatch
from llmops.bench import providers as _providers
from llmops.bench.clock import timed
from llmops.bench.harness import Case, Wrong, compare, outcome
from llmops.bench.limits import Limits, last_level_cache
from llmops.bench.providers import Provider

OURS, TORCH = _providers.OURS, _providers.TORCH
NO_KERNEL = "no kernel"


@dataclass
class Result:
    """One provider's part of a row; without a number, `note` says why."""

    provider: str
    us: float | None = None
    iqr_us: float = 0.0
    note: str = ""


@dataclass
class Row:
    """A measured case. Times in microseconds, rates in GB/s or GFLOP/s.

    `ratio` is torch's time over ours; `spread` the distance between the quartiles of ours, as a
    share of its median; `of_limit` the time at the limit over ours. `in_cache`: the bytes fit the
    last-level cache (L2 on a GPU), so that more than 100 % of a memory limit is possible.
    `compared` is False where results could not be (a random draw). `tokens` are those of one
    call of a whole model.
    """

    op: str
    passes: str
    dtype: str
    shape: str
    threads: int
    bytes: int = 0
    flops: int = 0
    ours_us: float | None = None
    torch_us: float | None = None
    torch_name: str = "eager"
    ratio: float | None = None
    spread: float = 0.0
    rate: float | None = None
    rate_unit: str = ""
    limit: str = ""
    of_limit: float | None = None
    in_cache: bool = False
    compared: bool = True
    curve: tuple[str, int] | None = None
    model: str = ""
    tokens: int = 0
    ours_tokens_per_s: float | None = None
    torch_tokens_per_s: float | None = None
    results: list[Result] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        return self.op, self.passes, self.dtype, self.shape, self.threads

    def tokens_per_s(self, us: float | None) -> float | None:
        return self.tokens / us * 1e6 if us and self.tokens else None

    @property
    def wrong(self) -> str:
        """What is wrong with ours; "" where nothing is, or where there is no kernel yet."""
        notes = (r.note for r in self.results if r.provider == OURS)
        return next((note for note in notes if not note.startswith(NO_KERNEL)), "")


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _checked(case: Case, provider: Provider, want: Any) -> Result:
    """The provider's result before it is timed: with a note, and then without a time, where it is
    absent, fails or is wrong."""
    if provider.call is None:
        return Result(provider.name, note=provider.note)
    try:
        with provider.setting(), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", FallbackWarning)
            dispatch._table.clear()  # it decides once, and warns once of each reason
            dispatch._warned.clear()
            compare(case, outcome(case, provider.call), want)
    except Wrong as wrong:
        return Result(provider.name, note=f"WRONG: {wrong}")
    except Exception as error:  # another project's code may fail in any way; it is shown
        return Result(provider.name, note=f"fails: {type(error).__name__}: {_line(error)}")
    fallen = [str(w.message) for w in seen if issubclass(w.category, FallbackWarning)]
    if fallen and provider.name == OURS:  # the reference's time is not ours
        return Result(provider.name, note=f"{NO_KERNEL}: {fallen[0][:120]}")
    return Result(provider.name)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]


def times_of(entrants: Sequence[Provider], seconds: float) -> list[list[float]]:
    """Seconds per call of each, one per round."""
    numbers, blocks = [], []
    for provider in entrants:
        assert provider.call is not None
        with provider.setting():
            once = timed(provider.call, 1)
            if once < 0.3:  # else one warm-up has been enough
                once = max(timed(provider.call, 1), 1e-7)
        numbers.append(max(1, int(0.01 / once)))
        blocks.append(numbers[-1] * once)
    rounds = max(5 if sum(blocks) < 1.0 else 3, min(31, int(seconds / sum(blocks))))
    times: list[list[float]] = [[] for _ in entrants]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for j in range(len(entrants)):
                at = (i + j) % len(entrants)
                call = entrants[at].call
                assert call is not None
                with entrants[at].setting():
                    times[at].append(timed(call, numbers[at]))
    finally:
        if collecting:
            gc.enable()
    return times


def measure(case: Case, limits: Limits, seconds: float = 0.6, extra: Iterable[str] = ()) -> Row:
    """One row. `extra` names what else to hold beside ours and torch: see providers.py."""
    with case.setting():
        entrants = _providers.of(case, extra)
        want = outcome(case, case.torch)
        results = [_checked(case, p, want) for p in entrants]
        good = [i for i, r in enumerate(results) if not r.note]
        for i, times in zip(good, times_of([entrants[i] for i in good], seconds), strict=True):
            low, high = quartiles(times)
            results[i].us, results[i].iqr_us = statistics.median(times) * 1e6, (high - low) * 1e6
    limit, least = limits.bound(case.bytes, case.flops, case.dtype, case.read_only)
    by_name = {r.provider: r for r in results}
    ours, theirs = by_name[OURS], by_name[TORCH]
    cache = last_level_cache(limits.device)
    row = Row(
        op=case.op,
        passes=case.passes,
        dtype=case.dtype_name,
        shape=case.shape,
        threads=torch.get_num_threads(),
        bytes=case.bytes,
        flops=case.flops,
        torch_us=theirs.us,
        torch_name=_providers.torch_name(case),
        limit=limit,
        in_cache=0 < case.bytes < cache and limit != "flops",
        compared=want is not None,
        curve=case.curve,
        model=case.model,
        tokens=case.tokens,
        results=results,
    )
    if case.tokens:
        row.ours_tokens_per_s = row.tokens_per_s(ours.us)
        row.torch_tokens_per_s = row.tokens_per_s(theirs.us)
    if ours.us is not None:
        row.ours_us, row.spread = ours.us, ours.iqr_us / ours.us
        row.ratio = theirs.us / ours.us if theirs.us is not None else None
        if limit:
            row.rate = (case.flops if limit == "flops" else case.bytes) / ours.us / 1e3
            row.rate_unit = "GFLOP/s" if limit == "flops" else "GB/s"
            row.of_limit = least / (ours.us * 1e-6)
    return row


def run(
    cases: Iterable[Case],
    seconds: float = 0.6,
    extra: Iterable[str] = (),
    limits: Limits | None = None,
    minutes: float | None = None,
) -> Iterator[Row]:
    """Rows as they are measured; none is begun later than `minutes` after the first."""
    limits = limits or Limits()
    end = None if minutes is None else time.monotonic() + 60 * minutes
    for case in cases:
        if end is not None and time.monotonic() > end:
            return
        yield measure(case, limits, seconds, extra)


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [asdict(r) for r in rows]


def from_json(row: dict[str, Any]) -> Row:
    """The inverse of as_json, for files of this and earlier versions."""
    known = {k: v for k, v in row.items() if k in Row.__dataclass_fields__}
    known["results"] = [Result(**r) for r in row.get("results", ())]
    return Row(**known)
