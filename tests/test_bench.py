"""The benchmark suite: what it must refuse, what it must notice, and that its files are whole.

Nothing here asserts a speed: the machine that runs the tests is not a quiet one.
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from simd_kit import ISAS
from torch import Tensor

import llmops
from llmops.bench import (
    cases,
    engines,
    harness,
    measure,
    memory,
    providers,
)
from llmops.bench import table as report_table
from llmops.bench.harness import Case, with_backward
from llmops.bench.limits import Limits
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
        assert bool(raw.fma_peak(True, 1)) == (isa in ("avx512_bf16", "amx"))
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


def test_bench_whole_model_agrees_with_plain_pytorch_and_transformers() -> None:
    passes = []
    for case in cases.collect(["model"], quick=True, dtypes=["float32"]):
        harness.check(case)
        theirs = case.peers["transformers"]()  # gradients too, arranged as ours
        harness.compare(case, harness.outcome(case, theirs), harness.outcome(case, case.torch))
        passes.append(case.passes)
    assert passes == 2 * ["prefill", "decode", "train", "generate"]


def test_bench_long_models_are_only_measured_by_name() -> None:
    assert "model_long" in cases.known() and "model_long" not in cases.names()
    case = next(cases.collect(["model_long"], quick=True))
    assert case.op == "model_long"


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
    shown = measure.Row("gelu", "fwd", "float32", "8", 1, model="BERT")
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
