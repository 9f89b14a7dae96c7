"""Rows on the terminal: through rich where it is installed and there is a terminal, else plain."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llmops.bench.measure import OURS, TORCH, Row

HEAD = ("op", "pass", "dtype", "shape", "ours us", "torch us", "ratio", "±", "rate", "limit")
WIDTHS = (20, 9, 9, 42, 10, 10, 7, 5, 15, 9)


def shape_of(row: Row) -> str:
    """The shape, and the model that has it."""
    return row.shape if row.model in row.shape else f"{row.shape} ({row.model})"


def cells(row: Row) -> tuple[str, ...]:
    """One row's text per column of HEAD."""
    of_limit = "" if row.of_limit is None else f"{row.of_limit:.0%} {row.limit}"
    return (
        row.op,
        row.passes,
        row.dtype,
        shape_of(row),
        "no number" if row.ours_us is None else f"{row.ours_us:.1f}",
        "–" if row.torch_us is None else f"{row.torch_us:.1f}",
        "–" if row.ratio is None else f"{row.ratio:.2f}x",
        f"{row.spread:.0%}",
        "" if row.rate is None else f"{row.rate:.1f} {row.rate_unit}",
        of_limit + ("*" if row.in_cache and row.of_limit else ""),
    )


def others(row: Row) -> list[str]:
    """A line for each further provider, and what is to be known about ours."""
    lines = [
        f"{r.provider}: {r.us:.1f} us" for r in row.results if r.us and r.provider not in _PAIR
    ]
    # Who is absent is said once, at the end, and in the JSON of each row.
    lines += [
        f"{r.provider}: {r.note}"
        for r in row.results
        if r.note.startswith(("WRONG", "fail", "no kernel"))
    ]
    if row.tokens:
        sides = [f"{r.provider} {row.tokens_per_s(r.us):.1f}" for r in row.results if r.us]
        lines.append(f"tokens/s: {', '.join(sides)}")
    if row.torch_name != "eager" and lines:
        lines.append(f"torch is {row.torch_name}")
    return lines


_PAIR = (OURS, TORCH)
NOTES = (
    "ratio: torch's time over ours. ±: distance between ours' quartiles. limit: the share of what "
    "this machine does, measured in this run; *: the data fit the last-level cache, which is "
    "faster than memory."
)


def _line(texts: Sequence[str]) -> str:
    pairs = zip(texts, WIDTHS, strict=True)
    return " ".join(t.ljust(w) if i < 4 else t.rjust(w) for i, (t, w) in enumerate(pairs)).rstrip()


def table(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of a plain table, one per row as it comes."""
    yield _line(HEAD)
    for row in rows:
        yield _line(cells(row))
        for line in others(row):
            yield f"    {line}"


def limits_line(limits: dict[str, float]) -> str:
    parts = [f"{name} {value:.1f}" for name, value in limits.items() if "/s" in name]
    return "limits measured now: " + ", ".join(parts)


@contextlib.contextmanager
def display(total: int, plain: bool = False) -> Iterator[Any]:
    """Gives show(row, ops done), called as rows come: a progress bar with a table at the end, or
    lines. The bar counts ops, `total` in all: how many cases each has is not known before."""
    rich = None
    if not plain and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import rich.progress as rich  # type: ignore[no-redef]
    if rich is None:
        print(_line(HEAD), flush=True)

        def show(row: Row, done: int) -> None:
            for line in list(table([row]))[1:]:
                print(line, flush=True)

        yield show
        return
    yield from _rich_display(total)


def _rich_display(total: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    console, rows = Console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=total)

            def show(row: Row, done: int) -> None:
                rows.append(row)
                text = f"{row.op} {row.passes} {row.dtype} {row.shape}"
                progress.update(task, completed=done, description=f"{text[:48]:48}")

            yield show
    finally:  # what there is, also when interrupted
        shown = Table(box=None, header_style="bold")
        for i, name in enumerate(HEAD):
            shown.add_column(name, justify="left" if i < 4 else "right", no_wrap=i != 3)
        for row in rows:
            good = row.ratio is not None and row.ratio >= 1
            shown.add_row(*cells(row), style=None if good else "yellow")
            for line in others(row):
                shown.add_row("", "", "", line, *[""] * 6, style="dim")
        console.print(shown)
