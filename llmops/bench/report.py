"""A result as one HTML file: no script, no external resource, light and dark as the reader has it.

Ratio bars, the roofline, bandwidth over size, scaling curves, whole models, peak memory, all rows.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from llmops.bench import table
from llmops.bench.measure import OURS, TORCH, Row, from_json
from llmops.bench.svg import Bar, Series, bars, plot

STYLE = """
:root{color-scheme:light dark;--page:#ffffff;--ink:#1b1f24;--soft:#5b6672;--rule:#dfe3e8;
--a:#1f6fd6;--b:#d9730d;--c:#8a94a0;--d:#2a9d63;--bad:#c0262d}
@media(prefers-color-scheme:dark){:root{--page:#14171b;--ink:#e8eaed;--soft:#9aa5b1;--rule:#2e343b;
--a:#6aa8f7;--b:#f2a24b;--c:#77828e;--d:#5fcf97;--bad:#ff7b72}}
body{background:var(--page);color:var(--ink);max-width:940px;margin:2rem auto;padding:0 1rem;
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
p,li{color:var(--soft);max-width:75ch}b{color:var(--ink)}
svg{max-width:100%;height:auto;font:12px system-ui,sans-serif}
text{fill:var(--ink)}.tick{fill:var(--soft);font-size:11px}.title{font-weight:600}
.grid{stroke:var(--rule)}.one{stroke:var(--ink);stroke-width:1.5}
.whisker{stroke:var(--ink);stroke-width:1;opacity:.55}.curve{fill:none!important;stroke-width:2}
.float32{fill:var(--a);stroke:var(--a)}.bfloat16{fill:var(--b);stroke:var(--b)}
.float16{fill:var(--d);stroke:var(--d)}rect{stroke:none!important}
circle.torch,circle[class~=torch]{fill:var(--page)}.curve.torch{stroke-dasharray:4 3}
.limit{stroke:var(--c);stroke-width:1.5;stroke-dasharray:7 3}
.wide svg{min-width:600px}.charts{display:flex;flex-wrap:wrap;gap:14px}
.key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 0;border-radius:2px}
.key~.key{margin-left:1em}
.scroll,.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;width:100%}
th{text-align:left;color:var(--soft);font-weight:600}
td,th{padding:.18rem .55rem;border-bottom:1px solid var(--rule);white-space:nowrap}
.n{text-align:right;font-variant-numeric:tabular-nums}.bad{color:var(--bad)}
summary{cursor:pointer;font-weight:600;margin:.6rem 0}
"""
APART = ("model", "overhead")


def html(result: dict[str, Any]) -> str:
    runs = [(run, [from_json(row) for row in run["rows"]]) for run in result["runs"]]
    first = runs[0][1] if runs else []
    sections = [
        _head(result),
        _ratios(runs),
        _roofline(runs[0][0], first) if runs else "",
        _bandwidth(runs[0][0], first) if runs else "",
        _curves(first),
        _grid(first),
        _apart(first, "model", "Whole models", "ms", 1e3),
        _apart(first, "overhead", "What one call costs", "µs", 1.0),
        _memory(result.get("memory", [])),
        _peers(result.get("peers", {}), result.get("peer_versions", {})),
        "".join(_all_rows(run, rows) for run, rows in runs),
    ]
    return (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>llmops bench</title><style>{STYLE}</style>'
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _head(result: dict[str, Any]) -> str:
    m = result["machine"]
    clocks = m.get("clocks") or {}
    facts = {
        "processor": f"{m['cpu']}, {m['isa']}, {m['cores']} cores",
        "GPU": m.get("gpu"),
        "memory": m.get("memory_gib") and f"{m['memory_gib']} GiB",
        "clock now": clocks.get("mhz_now") and f"{clocks['mhz_now']:.0f} MHz",
        "torch": m["torch"],
        "llmops": f"{m['llmops']}, commit {m['commit']}",
        "date": m.get("date"),
    }
    limits = result["runs"][0].get("limits", {}) if result["runs"] else {}
    for name, value in limits.items():
        if "/s" in name:
            facts[name.replace("GB/s", "").replace("GFLOP/s", "").strip()] = (
                f"{value:.1f} {name.split()[-1]}"
            )
    cells = "".join(
        f"<tr><th>{escape(k)}<td>{escape(str(v))}" for k, v in facts.items() if v is not None
    )
    return (
        "<h1>llmops beside PyTorch</h1><p>Each provider's values and gradients were compared with "
        "torch's before anything was timed; all ran in rotating order in one process; medians. "
        f"Limits are measured in the same run.</p><table>{cells}</table>"
    )


def _key(points: bool = True) -> str:
    """What the colours, and the marks of charts with points, mean."""
    colours = "".join(
        f'<span class="key" style="background:var(--{letter})"></span>{dtype}'
        for dtype, letter in (("float32", "a"), ("bfloat16", "b"), ("float16", "d"))
    )
    marks = (
        ". Filled points and full lines: llmops. Hollow points and broken lines: torch. Broken "
        "grey: the machine's limit."
    )
    return f"<p>{colours}{marks if points else ''}</p>"


def _ratios(runs: Sequence[tuple[dict[str, Any], list[Row]]]) -> str:
    parts = []
    for run, rows in runs:
        found: dict[str, dict[str, list[Row]]] = {}
        for row in rows:
            if row.ratio and row.op not in APART and row.curve is None:
                group = found.setdefault(f"{row.op} {row.passes}", {})
                group.setdefault(row.dtype, []).append(row)
        groups = [
            (name, [_bar(dtype, members) for dtype, members in sorted(group.items())[::-1]])
            for name, group in found.items()
        ]
        if groups:
            chart = bars(groups, f"Times as fast as PyTorch, {_run_name(run)}")
            parts.append(f'<h3>{_run_name(run)}</h3><div class="wide">{chart}</div>')
    if not parts:
        return ""
    return (
        "<h2>Times as fast as PyTorch</h2><p>Bars: median over the measured shapes. Lines through "
        "them: slowest to fastest shape. Left of 1x PyTorch is faster.</p>"
        + "".join([_key(False), *parts])
    )


def _bar(dtype: str, rows: list[Row]) -> Bar:
    ratios = [row.ratio for row in rows if row.ratio]
    shapes = "; ".join(f"{row.shape} {row.ratio:.2f}x" for row in rows)
    middle = statistics.median(ratios)
    return Bar(dtype, middle, min(ratios), max(ratios), dtype, f"{dtype}: {shapes}")


def _run_name(run: dict[str, Any]) -> str:
    threads = run["threads"]
    pages = ", torch with huge pages" if run.get("torch_huge_pages") else ""
    return f"{threads} thread{'s' if threads != 1 else ''}{pages}"


def _roofline(run: dict[str, Any], rows: Iterable[Row]) -> str:
    limits = run.get("limits", {})
    dots: dict[str, list[Row]] = {}
    for row in rows:
        if row.bytes and row.flops and row.ours_us:
            dots.setdefault(row.dtype, []).append(row)
    if not dots or "copy_gbs" not in limits:
        return ""
    every = [r for rows in dots.values() for r in rows]
    low = min(r.flops / r.bytes for r in every) / 2
    high = max(r.flops / r.bytes for r in every) * 2
    series: list[Series] = []
    peaks: dict[float, list[str]] = {}
    for dtype in dots:  # 16-bit types without a product of their own have fp32's limit
        if peak := limits.get(f"flops_{dtype}_gflops"):
            peaks.setdefault(peak, []).append(dtype)
    for peak, dtypes in peaks.items():
        knee = peak / limits["read_gbs"]
        ends = [x for x in (low, knee, high) if low <= x <= high]
        line = [(x, min(peak, x * limits["read_gbs"])) for x in ends]
        series.append(Series(f"{', '.join(dtypes)}: {peak:.0f} GFLOP/s", line, "limit"))
    for dtype, members in dots.items():
        for who in (OURS, TORCH):
            points, notes = [], []
            for r in members:
                us = r.ours_us if who == OURS else r.torch_us
                if us:
                    points.append((r.flops / r.bytes, r.flops / us / 1e3))
                    notes.append(f"{who}: {r.op} {r.passes} {r.dtype} {r.shape}")
            style = dtype if who == OURS else f"{dtype} torch"
            series.append(Series(f"{who} {dtype}", points, style, False, notes))
    chart = plot(series, _run_name(run), "flops per byte", "GFLOP/s", (700, 400))
    return (
        "<h2>Roofline</h2><p>Work whose flops and bytes are both counted: attention, matrix "
        "products and whole models. Broken grey: read bandwidth on the slope, multiply-add rate "
        f'of each dtype on the flat.</p>{_key()}<div class="wide">{chart}</div>'
    )


def _bandwidth(run: dict[str, Any], rows: Iterable[Row]) -> str:
    limits = run.get("limits", {})
    dots: dict[str, list[Row]] = {}
    for row in rows:
        if row.bytes and not row.flops and row.ours_us and row.curve is None:
            dots.setdefault(row.dtype, []).append(row)
    if not dots or "copy_gbs" not in limits:
        return ""
    sizes = [r.bytes for rows in dots.values() for r in rows]
    ends = (min(sizes) / 2, max(sizes) * 2)
    copy = f"copy: {limits['copy_gbs']:.1f} GB/s"
    series = [Series(copy, [(x, limits["copy_gbs"]) for x in ends], "limit")]
    for dtype, members in dots.items():
        for who in (OURS, TORCH):
            got = [(r, r.ours_us if who == OURS else r.torch_us) for r in members]
            points = [(float(r.bytes), r.bytes / us / 1e3) for r, us in got if us]
            notes = [f"{who}: {r.op} {r.passes} {r.dtype} {r.shape}" for r, us in got if us]
            style = dtype if who == OURS else f"{dtype} torch"
            series.append(Series(f"{who} {dtype}", points, style, False, notes))
    chart = plot(series, _run_name(run), "bytes moved at least", "GB/s", (700, 400))
    return (
        "<h2>Bandwidth</h2><p>Work that memory bounds. Grey: copy bandwidth of memory; what fits a "
        f"cache can be above it, and what is tiny is all call overhead.</p>{_key()}"
        f'<div class="wide">{chart}</div>'
    )


def _curves(rows: Iterable[Row]) -> str:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.curve and row.ours_us:
            found.setdefault(row.curve[0], []).append(row)
    charts = []
    for name, members in found.items():
        if len({r.curve[1] for r in members if r.curve}) < 3:
            continue  # --quick has one point of each
        unit = members[0].rate_unit
        series = []
        for dtype in dict.fromkeys(r.dtype for r in members):
            line = sorted(
                (r for r in members if r.dtype == dtype), key=lambda r: r.curve[1] if r.curve else 0
            )
            for who in (OURS, TORCH):
                points = []
                for r in line:
                    us = r.ours_us if who == OURS else r.torch_us
                    if us and r.curve:
                        work = r.flops if unit == "GFLOP/s" else r.bytes
                        points.append((float(r.curve[1]), work / us / 1e3))
                style = dtype if who == OURS else f"{dtype} torch"
                series.append(Series(f"{who} {dtype}", points, style))
        over = name.split(" over ", 1)[1]
        over = {"T": "sequence length T"}.get(over, over)
        charts.append(plot(series, name, over, unit, x_base=4 if "rows" in over else 2))
    if not charts:
        return ""
    return f'<h2>Scaling</h2>{_key()}<div class="charts">{"".join(charts)}</div>'


def _grid(rows: Iterable[Row]) -> str:
    """flash-attention's table: a line per length, a column per head dim and mask."""
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        if row.curve and row.op == "attention" and row.ours_us and row.torch_us:
            rates = [f"{row.flops / us / 1e3:.0f}" for us in (row.ours_us, row.torch_us)]
            column = row.curve[0].removeprefix("attention ").removesuffix(" over T")
            cells.setdefault((row.dtype, column), {})[row.curve[1]] = " / ".join(rates)
    if not cells:
        return ""
    lengths = sorted({t for column in cells.values() for t in column})
    head = "".join(f'<th class="n">{t}' for t in lengths)
    lines = [
        f"<tr><td>{dtype}<td>{escape(column)}"
        + "".join(f'<td class="n">{values.get(t, "–")}' for t in lengths)
        for (dtype, column), values in cells.items()
    ]
    return (
        "<h2>Attention on flash-attention's grid</h2><p>GFLOP/s, ours / torch, by sequence length. "
        "4 B H T² D operations, half of them if causal, 2.5 times as many backward. Its grid has "
        "batch x tokens 16k and a width of 2048; here 2k (at least one sequence) and 128.</p>"
        f'<div class="scroll"><table><tr><th>dtype<th>pass, mask, head dim{head}{"".join(lines)}'
        "</table></div>"
    )


def _apart(rows: Iterable[Row], op: str, title: str, unit: str, per: float) -> str:
    lines = [
        f"<tr><td>{escape(r.shape)}<td>{escape(r.passes)}<td>{r.dtype}"
        f'<td class="n">{r.ours_us / per:.1f}<td class="n">{r.torch_us / per:.1f}'
        f'<td class="n">{r.ratio:.2f}x{_tokens(r)}'
        for r in rows
        if r.op == op and r.ours_us and r.torch_us and r.ratio
    ]
    if not lines:
        return ""
    head = f'<tr><th>what<th>pass<th>dtype<th class="n">ours, {unit}<th class="n">torch, {unit}'
    head += '<th class="n">ratio'
    if op == "model":
        head += '<th class="n">ours, tokens/s<th class="n">torch, tokens/s'
    scroll = f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'
    return f"<h2>{title}</h2>{scroll}"


def _tokens(row: Row) -> str:
    rates = (row.tokens_per_s(row.ours_us), row.tokens_per_s(row.torch_us))
    return "".join(f'<td class="n">{rate:.1f}' for rate in rates if rate is not None)


def _memory(rows: Iterable[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        sizes = [r["ours_bytes"], r["torch_bytes"]]
        texts = ["fails" if x is None else f"{x / 2**20:.1f}" for x in sizes]
        lines.append(
            f"<tr><td>{escape(r['op'])}<td>{r['passes']}<td>{r['dtype']}<td>{escape(r['shape'])}"
            f'<td class="n">{texts[0]}<td class="n">{texts[1]}'
        )
    if not lines:
        return ""
    head = '<tr><th>op<th>pass<th>dtype<th>shape<th class="n">ours, MiB<th class="n">torch, MiB'
    return (
        "<h2>Peak memory of one call</h2><p>How far the resident set rises, results and scratch "
        f"included, inputs not.</p><div class='scroll'><table>{head}{''.join(lines)}</table></div>"
    )


def _peers(states: dict[str, str], versions: dict[str, str]) -> str:
    if not states:
        return ""
    lines = (
        f"<li><b>{escape(n)}</b> {escape(versions.get(n, ''))}: "
        + escape(s or "took part where it has the op")
        for n, s in states.items()
    )
    return f"<h2>Other libraries</h2><ul>{''.join(lines)}</ul>"


def _all_rows(run: dict[str, Any], rows: Iterable[Row]) -> str:
    head = "".join(f"<th>{h}" for h in table.HEAD)
    lines = []
    for row in rows:
        cells = table.cells(row)
        texts = [f"<td>{escape(c)}" for c in cells[:4]]
        texts += [f'<td class="n">{escape(c)}' for c in cells[4:]]
        lines.append(f"<tr{' class=bad' if row.wrong else ''}>{''.join(texts)}")
        lines += [f'<tr><td><td colspan="9">{escape(x)}' for x in table.others(row)]
    return (
        f"<details><summary>All rows, {_run_name(run)}</summary><p>{escape(table.NOTES)}</p>"
        f'<div class="scroll"><table><tr>{head}{"".join(lines)}</table></div></details>'
    )
