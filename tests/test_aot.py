"""tools/aot.py: its rules can fail, and what it reads from a compiled kernel is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def in_fresh_python(code: str) -> str:
    """Kernels of a process with TRITON_INTERPRET cannot be compiled, so in one without."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    start = "import sys; sys.path.insert(0, 'tools')\nimport aot, aot_compile\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        capture_output=True, text=True, env=environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_aot_rules_can_fail() -> None:
    code = """
from dataclasses import replace
good = {"registers": 60, "spills": 0, "shared": 1024, "instructions": ["HGMMA"], "config": ""}
job = aot.Job("k bf16 x sm_90", "sm_90", None, {}, "", None)
assert not list(aot.broken(job, good)) and not list(aot.grown(good, good))
assert not list(aot.grown(good, {**good, "registers": 60 + aot.SLACK}))
more = {**good, "registers": 61 + aot.SLACK}
assert list(aot.grown(good, more))[0].startswith("registers 60 ->")
assert list(aot.grown(good, {**good, "shared": 1025})) == ["shared 1024 -> 1025"]
assert list(aot.grown(good, {**good, "spills": 1})) == ["spills 0 -> 1"]
assert list(aot.grown(good, {**good, "moved": 1})) == ["moved 0 -> 1"]
amd = ".vgpr_count: 9 .vgpr_spill_count: 0 .sgpr_spill_count: 3 .private_segment_fixed_size: {}"
assert aot_compile._amd({"amdgcn": amd.format(0)}) == {
    "registers": 9, "spills": 0, "moved": 3, "instructions": []}
assert aot_compile._amd({"amdgcn": amd.format(8)})["spills"] == 3
assert list(aot.grown(good, {**good, "instructions": ["HMMA"]})) == ["no longer uses HGMMA"]
assert "3 spills" in list(aot.broken(job, {**good, "spills": 3}))[0]
assert not list(aot.broken(replace(job, spills="its reason"), {**good, "spills": 3}))
assert "shared memory" in list(aot.broken(job, {**good, "shared": 227 * 1024 + 1}))[0]
product = {**good, "product": 64, "instructions": ["HMMA"]}
assert list(aot.broken(job, product)) == ["16-bit products of 64 rows without HGMMA: ['HMMA']"]
assert not list(aot.broken(job, {**product, "instructions": ["HGMMA"]}))
assert not list(aot.broken(job, {**product, "product": 32}))
assert not list(aot.broken(replace(job, target="sm_80"), product))
described = {**good, "described": True}
assert list(aot.broken(job, described)) == ["tensor descriptors without UTMALDG: ['HGMMA']"]
assert not list(aot.broken(job, {**described, "instructions": ["HGMMA", "UTMALDG"]}))
unwritten = {**good, "undefined": ["UMOV UR4, UR5 reads UR5"]}
assert "nothing has written: UMOV" in list(aot.broken(job, unwritten))[0]
for target, wanted in (("sm_80", "HMMA"), ("sm_100", "UTCHMMA"), ("gfx90a", "mfma")):
    (found,) = aot.broken(replace(job, target=target), {**product, "instructions": ["LDGSTS"]})
    assert f"without {wanted}" in found
table = {job.name: good, "gone bf16 x sm_90": good}
assert aot.compare(table, {job.name: good}, {job.name, "new"}, set(table)) == [
    "new: not in the table", "gone bf16 x sm_90: in the table, and nothing launches it"]
assert "softmax_fwd_kernel" in " ".join(aot.missing({"softmax"}, set()))
dot = "%1 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x16xbf16> * tensor<16x64xbf16>"
rows = aot_compile._rows_of_products
assert rows(dot) == 64 and rows(dot.replace("bf16", "f32")) == rows("") == 0
"""
    in_fresh_python(code)


def test_aot_sees_spills_and_grids() -> None:
    """A kernel that holds far more than the registers of its one warp spills, and is told."""
    code = """
from llmops.kernels.triton import _config
with _config.override("softmax", ROWS=16, BLOCK=4096, num_warps=4):
    def calls(make, call):
        call("many", "softmax", make(4096, 4096))
    sys.modules["aot_calls.softmax"] = module = type(sys)("calls")
    module.calls = calls
    recorder = aot_compile.Recorder()
    recorder.run("softmax", "sm_80", "bf16")
(job,) = recorder.jobs.values()
print(*aot.broken(job, job.result()))
recorder.jobs.clear()
import torch
from llmops.kernels.triton import _launch, softmax
launch = _launch.Launch(softmax.softmax_fwd_kernel, (1, 70000), {}, {})
try:
    aot_compile._specialize(launch, "", "sm_80")
except AssertionError as error:
    print(error)
"""
    out = in_fresh_python(code)
    assert " spills (" in out and "ROWS=16" in out
    assert "(1, 70000, 1) is beyond CUDA's" in out


def test_aot_tells_table_entries_that_no_call_looks_up() -> None:
    """Those of rows of other lengths than the calls', and one that a call replaced by its own."""
    code = """
from llmops.kernels.triton import _config, _rows
def calls(make, call):
    call("n=64", "softmax", make(4096, 64))
    with _config.override("softmax", num_warps=8):
        call("n=128", "softmax", make(4096, 128))
sys.modules["aot_calls.softmax"] = module = type(sys)("calls")
module.calls = calls
recorder = aot_compile.Recorder()
recorder.run("softmax", "sm_90", "bf16")
found = list(aot.unreached(recorder.choices, ["softmax"]))
first = "table entry softmax 16 float32 sm_90 (BLOCK=16 ROWS=16 num_warps=1): no call"
assert found[0].startswith(first)
told = {line.split(" (")[0].removeprefix("table entry softmax ") for line in found}
every = {f"{n} {dtype} sm_90" for n in _rows.lengths() for dtype in ("float32", "bfloat16")}
assert told == every - {"64 bfloat16 sm_90"}
assert sum("softmax 32768 bfloat16" in line for line in found) == 2  # with a mask, and without
assert not list(aot.unreached(recorder.choices, ["gelu"]))
"""
    in_fresh_python(code)


def test_aot_recording_launches_nothing() -> None:
    """Meta tensors in, launches out, tables asked for the architecture that was named; the next
    call is one of the device again."""
    code = """
import torch
from llmops.kernels.triton import _launch, softmax
with _launch.recording("gfx942") as launches:
    assert _launch.architecture() == "gfx942" and _launch.processors() == 132
    y = softmax.softmax(torch.empty(8, 100, device="meta"), 0.5)
    softmax.softmax(torch.empty(0, 100, device="meta"))
    with _launch.recording("sm90") as inner:
        assert _launch.architecture() == "sm90"
    assert not inner and _launch.architecture() == "gfx942"
(launch,) = launches
assert y.is_meta and y.shape == (8, 100)
assert launch.kernel is softmax.softmax_fwd_kernel and launch.grid == (1,)
assert launch.arguments["n"] == 100 and launch.arguments["scale"] == 0.5
assert launch.arguments["x"].is_meta and launch.arguments["mask"] is None
assert launch.constants["BLOCK"] == 128
"""
    in_fresh_python(code)


PROGRAM = """
        /*0000*/                   ULDC.64 UR4, c[0x0][0x210] ;
        /*0010*/              @P0  BRA `(.L_x_1) ;
        /*0020*/                   UMOV UR6, 0x40 ;
        /*0030*/                   UIADD3 UR7, UR6, UR5, URZ ;
.L_x_1:
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, R24 ;
        /*0050*/                   EXIT ;
"""


def test_aot_reads_registers_that_nothing_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """B's descriptor (UR6, UR7) is not written where the branch is taken."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import sass

    (found,) = sass.undefined(PROGRAM)
    assert found.startswith("HGMMA") and found.endswith("reads UR6, UR7")
    assert sass.undefined(PROGRAM.replace("@P0", "   ").replace("BRA `(.L_x_1)", "NOP")) == []
    assert sass.undefined(PROGRAM.replace("UMOV UR6", "UMOV UR9"))[0].endswith("reads UR6")
    both = PROGRAM.replace("@P0  BRA", "@P0 UIADD3.64 UR6, UR4, UR4, URZ ;\n BRA")
    assert len(sass.undefined(both)) == 0


def test_aot_sees_what_the_assembler_gets_wrong() -> None:
    """Values of 24 columns in tiles of 32, beside keys in 64, as before they were widened."""
    code = """
from llmops.kernels.triton import _attention_problem as problem
def calls(make, call):
    q, v = make(1, 4, 512, 40), make(1, 4, 512, 24)
    call("d=40x24", "attention", q, q, v, None, False, 0.125)
sys.modules["aot_calls.attention"] = module = type(sys)("calls")
module.calls = calls
def found():
    recorder = aot_compile.Recorder()
    recorder.run("attention", "sm_90", "bf16")
    (job,) = recorder.jobs.values()
    entry = job.result()
    assert "HGMMA" in entry["instructions"]
    return list(aot.broken(job, entry))
assert found() == []
problem.padded = lambda dim, dim_v, dtype: (64, 32)
print(found())
"""
    assert "nothing has written: UIADD3" in in_fresh_python(code)
