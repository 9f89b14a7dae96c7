"""The benchmark suite: what it must refuse, what it must notice, and that its files are whole.

Nothing here asserts a speed: the machine that runs the tests is not a quiet one.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import importlib
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from simd_kit import ISAS
from torch import Tensor

import llmops
from llmops.bench import (
    cases,
    command,
    commit_result,
    compare,
    engines,
    harness,
    machine,
    measure,
    memory,
    providers,
    report,
    resume,
)
from llmops.bench import table as report_table
from llmops.bench.harness import Case, with_backward
from llmops.bench.limits import Limits
from llmops.cli import main
from llmops.model import GPT, GPTConfig

SMALL = Limits(megabytes=8)


class WrongGradient(torch.autograd.Function):
    """softmax with a right value and a gradient that is 1 % off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.softmax(x, -1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return 1.01 * y * (grad - (grad * y).sum(-1, keepdim=True))


def softmax_case(passes: str, ours: Any, **fields: Any) -> Case:
    x = torch.randn(64, 128, requires_grad=True)
    return Case(
        "softmax",
        passes,
        torch.float32,
        "64x128",
        with_backward(passes, ours, (x,)),
        with_backward(passes, lambda t: torch.softmax(t, -1), (x,)),
        bytes=2 * x.numel() * 4,
        **fields,
    )


def measured(case: Case, **options: Any) -> measure.Row:
    return measure.measure(case, SMALL, seconds=0.001, **options)


# ---- honest by construction ----------------------------------------------------------------------


@pytest.mark.parametrize("passes", ["fwd", "bwd", "fwd+bwd"])
def test_bench_right_provider_gets_a_number(passes: str) -> None:
    row = measured(softmax_case(passes, llmops.softmax))
    assert row.ours_us and row.torch_us and row.ratio == row.torch_us / row.ours_us
    assert not row.wrong and row.rate and row.of_limit and row.limit == "copy"


@pytest.mark.parametrize(
    ("passes", "ours", "reason"),
    [
        ("fwd", lambda x: torch.softmax(x, -1) * 1.01, "results differ"),
        ("fwd", lambda x: torch.softmax(x, -1) + torch.nan, "results differ"),
        ("fwd", lambda x: torch.softmax(x, -1)[:-1], "shapes differ"),
        ("bwd", WrongGradient.apply, "results differ"),
        ("fwd+bwd", WrongGradient.apply, "results differ"),
        # Right gradients of a wrong value: a constant more.
        ("bwd", lambda x: torch.softmax(x, -1) + 0.1, "results differ"),
    ],
)
def test_bench_wrong_provider_gets_no_number(passes: str, ours: Any, reason: str) -> None:
    case = softmax_case(passes, ours)
    row = measured(case)
    assert row.ours_us is None and row.ratio is None and row.rate is None
    assert row.wrong.startswith("WRONG") and reason in row.wrong
    assert row.torch_us  # who is right is still measured
    with pytest.raises(ValueError, match=f"{reason}.*wrong provider gets no number"):
        harness.check(case)


def test_bench_wrong_further_provider_gets_no_number() -> None:
    def fails() -> Tensor:
        raise RuntimeError("no kernel image")

    x = torch.zeros(64, 128)
    others = {"zeros": lambda: x, "broken": fails}
    row = measured(softmax_case("fwd", llmops.softmax, others=others))
    notes = {r.provider: (r.us, r.note) for r in row.results}
    assert notes["zeros"][0] is None and notes["zeros"][1].startswith("WRONG")
    assert notes["broken"] == (None, "fails: RuntimeError: no kernel image")
    assert row.ours_us


def test_bench_in_place_calls_are_compared_on_copies() -> None:
    def case(ours: Any) -> Case:
        x = torch.ones(4, 4)
        return Case(
            "twice",
            "fwd",
            torch.float32,
            "4x4",
            with_backward("fwd", ours, (x,)),
            with_backward("fwd", lambda t: t * 2, (x,)),
            in_place=True,
        )

    assert measured(case(lambda t: t.mul_(2))).compared
    assert measured(case(lambda t: t.mul_(3))).ours_us is None


def test_bench_a_draw_is_marked_as_not_compared() -> None:
    found = {c.shape.split()[0]: c for c in cases.collect(["sample"], True, ["float32"])}
    assert harness.outcome(found["plain"], found["plain"].ours) is None
    assert harness.outcome(found["greedy"], found["greedy"].ours) is not None


def test_bench_providers_run_in_rotating_order() -> None:
    calls: list[str] = []
    # Longer than a block: one call per round.
    entrants = [
        providers.Provider(n, lambda n=n: (calls.append(n), torch.randn(2_000_000).sort()))
        for n in "abc"
    ]
    times = measure.times_of(entrants, seconds=0.001)
    rounds = [calls[i : i + 3] for i in range(len(calls) - 3 * len(times[0]), len(calls), 3)]
    assert rounds[:3] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_bench_names_the_sdpa_kernel() -> None:
    for case in cases.collect(["attention"], True, ["float32"]):
        assert providers.torch_name(case) == "SDPA flash", case
    q = torch.randn(1, 2, 8, 16)
    mask = torch.zeros(1, 2, 8, 8, requires_grad=True)
    call = with_backward("fwd", lambda q, m: F.scaled_dot_product_attention(q, q, q, m), (q, mask))
    case = Case("attention", "fwd", torch.float32, "masked", call, call)
    assert providers.torch_name(case).startswith("SDPA ")


@pytest.mark.parametrize("group", providers.GROUPS)
def test_bench_every_group_of_providers(group: str) -> None:
    """Each provider of a group is right, or says why it is not there."""
    if group == "compile" and not torch._inductor.cpp_builder.get_cpp_compiler():
        pytest.skip("torch.compile needs a C++ compiler")
    for passes in ("fwd", "bwd"):
        row = measured(softmax_case(passes, llmops.softmax), extra=[group])
        reasons = {*llmops.backends().values(), *providers.availability().values()}
        for r in row.results:
            assert r.us or r.note in reasons, r
    if group == "isa":
        assert {r.provider for r in row.results} >= {f"llmops {i}" for i in ISAS[:-1]}
    if group == "backends":
        assert next(r for r in row.results if r.provider == "llmops reference").us
    if group == "peers":
        absent = {n for n, state in providers.availability().items() if "not installed" in state}
        assert all("pip install" in providers.availability()[n] for n in absent)


def test_bench_ours_on_the_reference_gets_no_number() -> None:
    """Where no kernel serves, the time would be plain PyTorch's under our name."""
    x = torch.randn(4, 8, dtype=torch.float64)
    ours = with_backward("fwd", llmops.softmax, (x,))
    theirs = with_backward("fwd", lambda t: torch.softmax(t, -1), (x,))
    for _ in range(2):  # the dispatcher itself warns once only
        row = measured(Case("softmax", "fwd", torch.float64, "4x8", ours, theirs))
        assert row.ours_us is None and row.torch_us and not row.wrong
        assert row.results[0].note.startswith("no kernel: llmops.softmax")


def test_bench_on_a_gpu_names_its_kernels_and_leaves_out_what_runs_on_cpu() -> None:
    q = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16)
    call = with_backward("fwd", F.scaled_dot_product_attention, (q, q, q))
    case = Case("attention", "fwd", torch.bfloat16, "", call, call, device="cuda")
    names = [p.name for p in providers.of(case, providers.GROUPS)]
    assert {"SDPA flash", "SDPA cuDNN", "flash-attn", "llmops cuda"} <= set(names)
    assert not {"zentorch", "onnxruntime", "llmops cpu", "llmops scalar"} & set(names)


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_bench_limit_loops_do_what_they_count(isa: str) -> None:
    with providers._on_isa(isa):
        raw, threads = torch.ops.llmops_cpu, torch.get_num_threads()
        once = raw.fma_peak(False, 1)
        assert once > 0 and raw.fma_peak(False, 1000) == 1000 * once
        assert bool(raw.fma_peak(True, 1)) == (isa == "avx512_bf16")
        assert once % threads == 0
        x = torch.arange(200_003.0)[1:]  # no multiple of a vector, unaligned
        y = torch.zeros(200_004)[2:]
        raw.copy_peak(x, y[:200_002])
        assert torch.equal(x, y[:200_002])
        assert isinstance(raw.read_peak(x), float)


def test_bench_limits_bound_a_row_as_a_roofline_does() -> None:
    gflops = SMALL.flops(torch.float32)
    assert gflops > 0 and SMALL.copy_gbs > 0 and SMALL.read_gbs >= SMALL.copy_gbs
    name, seconds = SMALL.bound(0, 10**9, torch.float32, False)
    assert name == "flops" and seconds == pytest.approx(1 / gflops)
    assert SMALL.bound(10**9, 1, torch.float32, False)[0] == "copy"
    assert SMALL.bound(10**9, 1, torch.float32, True) == ("read", pytest.approx(1 / SMALL.read_gbs))
    assert SMALL.bound(0, 0, torch.float32, False) == ("", 0.0)


# ---- cases ---------------------------------------------------------------------------------------


# Making linear_cross_entropy's takes half a minute where torch has no fast 16-bit product; its own
# tests compare the two. Whole models follow below.
APART = ("linear_cross_entropy", "model", "patched")


@pytest.mark.parametrize("name", [n for n in cases.names() if n not in APART])
def test_bench_cases_are_distinct_and_agree(name: str) -> None:
    keys = []
    for case in cases.collect([name], quick=True):
        keys.append(str(case))
        assert case.model or case.curve or case.op in ("overhead", "softmax"), case
        with case.setting():
            harness.check(case)
    assert keys and max(Counter(keys).values()) == 1, Counter(keys).most_common(1)


def test_bench_whole_model_agrees_with_plain_pytorch() -> None:
    passes = []
    for case in cases.collect(["model"], quick=True, dtypes=["float32"]):
        harness.check(case)
        passes.append(case.passes)
    assert passes == 2 * ["prefill", "decode", "train", "generate"]


def test_bench_patched_models_agree_with_themselves() -> None:
    passes = set()
    for case in cases.collect(["patched"], quick=True):
        harness.check(case)
        passes.add((case.model, case.passes))
    assert {m for m, _ in passes} == {"Llama", "GPT-2", "BERT"}
    assert {p for _, p in passes} == {"fwd", "train", "generate"}


def test_bench_has_the_models_shapes_and_names_them() -> None:
    """Not computed, only made: two of the shapes are of gigabytes, so by the modules' tables."""
    tables = [
        str(vars(importlib.import_module(f"llmops.bench.cases.{name}"))[table])
        for name, table in (("rms_norm", "SHAPES"), ("swiglu", "SHAPES"), ("rope", "SHAPES"),
                            ("attention", "PREFILL"), ("linear", "WEIGHTS"))
    ]  # fmt: skip
    for table in tables:
        assert "Gemma" in table and "Llama 3 8B" in table and "SmolLM2" in table, table
    found = {str(c): c.model for c in cases.collect(["gelu", "layer_norm"], True)}
    assert {"BERT, GPT-2"} == set(found.values())
    shown = row(1, 2)
    shown.model = "BERT"
    assert "8 (BERT)" in "".join(report_table.table([shown]))


@pytest.mark.parametrize("engine", ["xllamacpp", "ctranslate2"])
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_bench_engines_generate_the_same_tokens(shape: str, engine: str) -> None:
    """Weights far from the start's, or every token repeats the one before."""
    pytest.importorskip(engine, reason=providers.PEERS[engine][1])
    llama: dict[str, Any] = {
        "n_head": 6, "n_kv_head": 2, "d_model": 384, "d_ff": 512, "position": "rotary",
        "norm": "rms_norm", "activation": "swiglu", "bias": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=512, n_layer=2, **(llama if shape == "llama" else {})))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and name != "tokens":
                p.mul_(8)
            elif p.dim() == 1:
                p.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)
    ids = torch.tensor([[5, 9, 70]])
    want = model.generate(ids, 16, temperature=0.0)
    assert isinstance(want, Tensor) and len(want.unique()) > 8
    assert torch.equal(getattr(engines, engine)(model, ids, 16)(), want)


def test_bench_memory_is_the_size_of_the_result() -> None:
    rows = list(memory.rows(["softmax"], True, ["float32"]))
    forward = next(r for r in rows if r["passes"] == "fwd" and r["shape"] == "4096x1024")
    for who in ("ours_bytes", "torch_bytes"):  # y alone, 16 MiB; huge pages round up by 2 MiB
        assert 16 * 2**20 - 2**19 < forward[who] < 18.5 * 2**20, forward


# ---- comparison ----------------------------------------------------------------------------------


def row(ours: float, torch_us: float, iqr: float = 0.01) -> measure.Row:
    results = [
        measure.Result("llmops", ours, ours * iqr),
        measure.Result("torch", torch_us, torch_us * iqr),
    ]
    return measure.Row(
        "gelu", "fwd", "float32", "8", 1, ours_us=ours, torch_us=torch_us,
        ratio=torch_us / ours, results=results,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row(10, 20), row(10.3, 20), "same"),
        (row(10, 20), row(15, 20), "slower"),
        (row(15, 20), row(10, 20), "faster"),
        (row(10, 20), row(15, 30), "same"),  # a busier machine
        (row(10, 30), row(10, 20), "same"),  # torch became faster
        (row(10, 20, 0.3), row(13, 20, 0.3), "same"),  # noisy
    ],
)
def test_bench_compare_tells_moves_from_noise(
    old: measure.Row, new: measure.Row, verdict: str
) -> None:
    (move,) = compare.compare([old], [new])
    assert move.verdict == verdict


def test_bench_compare_of_another_machine_uses_ratios() -> None:
    assert compare.compare([row(10, 20)], [row(5, 5)], same_machine=False)[0].verdict == "slower"
    assert compare.compare([row(10, 20)], [row(30, 60)], same_machine=False)[0].verdict == "same"


# ---- the command ---------------------------------------------------------------------------------

QUICK = ["bench", "gelu", "--quick", "--seconds", "0.001", "--dtype", "float32", "--plain"]


def test_bench_command_writes_and_compares(tmp_path: Path, capsys: Any) -> None:
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "csv", "html")}
    options = [x for kind, file in files.items() for x in (f"--{kind}", str(file))]
    assert main([*QUICK, *options, "--with", "isa"]) == 0
    shown = capsys.readouterr().out
    assert "limits measured now" in shown and "llmops scalar" in shown
    result = json.loads(files["json"].read_text())
    assert result["format"] == command.FORMAT and result["runs"][0]["complete"]
    assert {"cpu", "isa", "cores", "clocks", "torch", "commit"} <= set(result["machine"])
    rows = result["runs"][0]["rows"]
    assert rows == measure.as_json(map(measure.from_json, rows))
    with files["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert {line["provider"] for line in lines} >= {"llmops", "torch (eager)", "llmops scalar"}


def doctored(file: Path, factor: float, target: Path) -> Path:
    """The result in `file` as if ours had taken `factor` times as long."""
    result = json.loads(file.read_text())
    for row in result["runs"][0]["rows"]:
        row["ours_us"], row["ratio"] = row["ours_us"] * factor, row["ratio"] / factor
        for r in row["results"]:
            if r["provider"] == "llmops":
                r["us"], r["iqr_us"] = r["us"] * factor, r["iqr_us"] * factor
    target.write_text(json.dumps(result))
    return target


@pytest.mark.parametrize(
    ("factor", "status", "counts"),
    [
        (1 / 3, 1, "4 slower, 0 faster, 0 within noise"),
        (1.0, 0, "0 slower, 0 faster, 4 within noise"),
        (3.0, 0, "0 slower, 4 faster, 0 within noise"),
    ],
)
def test_bench_compare_exit_status(
    factor: float, status: int, counts: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """All of the command but the clock: every provider takes a microsecond, so that a busy machine
    moves nothing."""
    monkeypatch.setattr(measure, "times_of", lambda entrants, seconds: [[1e-6] * 3] * len(entrants))
    new = tmp_path / "new.json"
    assert main([*QUICK, "--json", str(new)]) == 0
    capsys.readouterr()
    assert main([*QUICK, "--compare", str(doctored(new, factor, tmp_path / "old.json"))]) == status
    said = capsys.readouterr().out
    assert f"{counts}, 0 not in the old file" in said
    assert said.count("  slower: gelu fwd float32 512x3072: 0.3 -> 1.0 us") == status


@pytest.mark.parametrize(("factor", "status"), [(0.001, 1), (1000.0, 0)])
def test_bench_compare_exit_status_of_the_process(
    factor: float, status: int, tmp_path: Path
) -> None:
    new = tmp_path / "new.json"
    assert bench_process(*QUICK[1:], "--json", new).returncode == 0
    old = doctored(new, factor, tmp_path / "old.json")
    ended = bench_process(*QUICK[1:], "--seconds", "0.05", "--compare", old)
    assert ended.returncode == status, ended.stdout[-2000:]


def bench_process(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmops", "bench", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_bench_on_a_terminal_shows_progress_and_a_table() -> None:
    pytest.importorskip("rich", reason="pip install rich")
    options = [x for x in QUICK if x != "--plain"]
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "CI")}
    process = subprocess.Popen(
        [sys.executable, "-m", "llmops", *options],
        stdout=terminal,
        env={**environment, "TERM": "xterm-256color"},
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while block := os.read(controller, 65536):
            shown += block
    os.close(controller)
    assert process.wait() == 0
    text = shown.decode()
    assert "\x1b[" in text  # colours, and the cursor going back over the bar
    assert re.search(r"gelu bwd float32 512x3072 [^\r]*━[^\r]*0/1", text), text[:2000]
    table = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).split("ratio")[1]
    assert len(re.findall(r"gelu +(?:fwd|bwd) +float32 +(?:tanh )?512x3072", table)) == 4, table


def test_bench_command_exits_1_on_a_regression(tmp_path: Path, monkeypatch: Any) -> None:
    machine = {"cpu": "c", "isa": "i", "commit": "x", "torch": "t"}
    old = {"machine": machine, "rows": measure.as_json([row(10, 20)])}
    lines, regressed = compare.report(old, [row(20, 20)], machine)
    assert regressed and any("slower: gelu" in line for line in lines)
    assert not compare.report(old, [row(10, 20)], machine)[1]
    lost = row(10, 20)
    lost.ours_us = lost.ratio = None
    lost.results[0] = measure.Result("llmops", note="WRONG: results differ")
    lines, regressed = compare.report(old, [lost], machine)
    assert regressed and any("lost its number" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "no cases for nothing"),
        (["gelu", "--threads", "0"], "--threads must be numbers of at least 1"),
        (["gelu", "--seconds", "0"], "--seconds must be above 0"),
        (["gelu", "--json", "/nowhere/x.json"], "its folder does not exist"),
        (["gelu", "--compare", "/nowhere/x.json"], "no such file"),
    ],
)
def test_bench_command_rejects(options: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", *options]) == 1
    assert message in capsys.readouterr().err


def test_bench_huge_pages_are_another_process() -> None:
    run = command.child_run([*QUICK[1:], "--huge-pages", "on"], "on")
    assert run["torch_huge_pages"] is True and run["rows"][0]["ours_us"]


def test_bench_report_needs_nothing_from_outside() -> None:
    one = measure.measure(softmax_case("fwd", llmops.softmax), SMALL, 0.001)
    one.shape = "<64&128>"
    run = {"threads": 1, "torch_huge_pages": False, "limits": SMALL.as_json()}
    machine = {"cpu": "c", "isa": "i", "cores": 1, "torch": "t", "llmops": "l", "commit": "x"}
    curve = [
        measure.Row(**{**vars(row(10, 20)), "bytes": 8 * n, "curve": ("gelu over rows", n),
                       "rate_unit": "GB/s"})
        for n in (1, 10, 100)
    ]  # fmt: skip
    rows = measure.as_json([one, *curve])
    html = report.html({"machine": machine, "runs": [{**run, "rows": rows}]})
    assert not re.search(r"https?:|//|src=|<link|<script|url\(|@import", html)
    assert "prefers-color-scheme:dark" in html and "<svg" in html and "Scaling" in html
    assert "<64&128>" not in html and "&lt;64&amp;128&gt;" in html


def keys(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [tuple(row[k] for k in ("op", "passes", "dtype", "shape")) for row in rows]


def test_bench_resume_goes_on_behind_the_last_row(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    measured_now: list[str] = []

    def stops(case: Case, *rest: Any) -> measure.Row:
        if len(measured_now) == 2:
            raise KeyboardInterrupt
        measured_now.append(str(case))
        return whole(case, *rest)

    whole = measure.measure
    part, result = tmp_path / "part.jsonl", tmp_path / "r.json"
    monkeypatch.setattr(measure, "measure", stops)
    assert main([*QUICK, "--resume", str(part)]) == 130
    with part.open("a") as file:
        file.write('{"setting": {"thr')  # cut off while it was written
    before, measured_now = measured_now, []
    assert main([*QUICK, "--resume", str(part), "--json", str(result)]) == 0
    rows = json.loads(result.read_text())["runs"][0]["rows"]
    assert len(before) == len(measured_now) == 2 and len(set(keys(rows))) == 4
    assert [" ".join(k) for k in keys(rows)] == before + measured_now

    # Another setting is not mixed in; another machine neither, and that is said.
    measured_now = []
    monkeypatch.setattr(measure, "measure", whole)
    assert main([*QUICK, "--resume", str(part), "--seconds", "0.002"]) == 0
    assert len(part.read_text().splitlines()) == 1 + 4 + 4
    part.write_text(part.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "0.1"'))
    assert main([*QUICK, "--resume", str(part)]) == 1
    assert "was begun with torch 0.1" in capsys.readouterr().err


TINY = (
    commit_result.Stage("plain", "p", 0.001, tuple(QUICK[2:])),
    commit_result.Stage("huge", "h", 1.0, tuple(QUICK[2:])),
    commit_result.Stage("memory", "m", 1.0, huge_pages=None),
)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stage's process is this one, and its limits are measured on little memory."""

    def child_run(options: list[str], huge_pages: str, timeout: float) -> Any:
        file = tmp_path / "run.json"
        assert main(["bench", *options, "--json", str(file)]) == 0
        run = json.loads(file.read_text())["runs"][0]
        file.unlink()
        return run

    monkeypatch.setattr(command, "Limits", lambda device: SMALL)
    monkeypatch.setattr(command, "child_run", child_run)


@pytest.mark.usefixtures("in_process")
def test_bench_committed_result_completes_by_running_again(tmp_path: Path, capsys: Any) -> None:
    """The first stage has time for one row per run; the file is written with the last."""
    statuses: list[int] = []
    while 0 not in statuses and len(statuses) < 6:
        statuses.append(commit_result.make(tmp_path, TINY, ("gelu",)))
        files = list(tmp_path.glob("*.json"))
        assert bool(files) == (statuses[-1] == 0)
        assert files or "not complete: plain;" in capsys.readouterr().out
    assert statuses == [1, 1, 1, 0]
    assert list(tmp_path.iterdir()) == files
    result = json.loads(files[0].read_text())
    assert [run["stage"] for run in result["runs"]] == ["plain", "huge"]
    for run in result["runs"]:
        assert run["complete"] and len(set(keys(run["rows"]))) == len(run["rows"]) == 4
    assert len(set(keys(result["memory"]))) == len(result["memory"]) > 4
    assert set(result["peer_versions"]) <= set(result["peers"]) == set(providers.PEERS)


@pytest.mark.usefixtures("in_process")
def test_bench_committed_result_drops_what_another_commit_left(tmp_path: Path) -> None:
    here = machine.describe()
    part = tmp_path / f".{machine.machine_class(here)}" / "huge.jsonl"
    part.parent.mkdir()
    resume.Kept(part, {**here, "commit": "other"}, {"memory": True}).add({"op": "foreign"})
    part.with_suffix(".json").write_text('{"rows": ["foreign"]}')
    assert commit_result.make(tmp_path, TINY[1:2], ("gelu",)) == 0
    assert part.exists() is False and "foreign" not in next(tmp_path.glob("*.json")).read_text()


def test_bench_committed_result_says_how_long_it_takes() -> None:
    minutes = sum(stage.minutes for stage in commit_result.STAGES)
    assert f"together {minutes:g} minutes" in " ".join((commit_result.__doc__ or "").split())
