"""`make gpu` without a GPU: its stages go on, run out of time, fail aloud and leave whole JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("llmops_tools_gpu", ROOT / "tools" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.gpu_run, "STATE", tmp_path / "state")
    monkeypatch.setattr(module.gpu_run, "LEAST", 0.05)
    monkeypatch.setattr(module.gpu_run, "tree", lambda: "sources")
    return module


def unit(gpu: Any, name: str, code: str, seconds: float = 20.0) -> Any:
    return gpu.Unit(name, lambda record: [sys.executable, "-c", code], seconds, gpu.plain)


def stage(gpu: Any, *units: Any, name: str = "fake") -> Any:
    return gpu.Stage(name, 5.0, lambda: list(units))


def test_gpu_resumes_and_records_failures(gpu: Any, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    say = f"open({str(log)!r}, 'a').write('x')"
    fake = stage(gpu, unit(gpu, "good", say), unit(gpu, "bad", f"{say}; raise OSError('broken')"))
    for _ in range(2):  # the second call runs neither again and still says what failed
        found = gpu.work([fake], 1.0, out)
        assert found["stages"]["fake"]["state"] == "failed" and log.read_text() == "xx"
        assert "OSError: broken" in found["stages"]["fake"]["units"]["bad"]["tail"]
    for folder in (out, gpu.gpu_run.STATE):
        assert json.loads((folder / "fake.json").read_text())["units"]["good"]["state"] == "passed"
        assert json.loads((folder / "summary.json").read_text())["stages"] == found["stages"]
    gpu.gpu_run.tree = lambda: "other sources"
    gpu.work([fake], 1.0, out, keep=True)
    assert log.read_text() == "xx"
    gpu.work([fake], 1.0, out)
    assert log.read_text() == "xxxx", "results of other sources are stale"


def test_gpu_stops_at_its_time_and_goes_on(gpu: Any, tmp_path: Path) -> None:
    """A unit that the stage's end cuts runs again; one that used its own limit does not."""
    later = tmp_path / "later"
    wait = f"import os, time; time.sleep(0 if os.path.exists({str(later)!r}) else 60)"
    units = (
        unit(gpu, "hangs", "import time; time.sleep(60)", 0.3),
        unit(gpu, "cut", wait),
        unit(gpu, "last", "pass"),
    )
    start = time.monotonic()
    found = gpu.work([stage(gpu, *units)], 1.0 / 60, tmp_path)["stages"]["fake"]
    assert time.monotonic() - start < 10
    assert [u["state"] for u in found["units"].values()] == ["killed", "cut", "pending"]
    assert found["state"] == "unfinished"
    held = json.loads((tmp_path / "fake.json").read_text())
    assert [u["state"] for u in held["units"].values()] == ["killed", "cut", "pending"]
    later.touch()
    found = gpu.work([stage(gpu, *units)], 1.0, tmp_path)["stages"]["fake"]
    assert [u["state"] for u in found["units"].values()] == ["killed", "passed", "passed"]
    assert found["state"] == "failed", "a unit that hung is no success"


def test_gpu_what_its_limit_cut_goes_last(gpu: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    say = f"open({str(log)!r}, 'a').write({{!r}}); "
    wait = f"import os, time; time.sleep(60 * (os.path.getsize({str(log)!r}) < 2))"

    def read(record: dict[str, Any], text: str, status: int | None) -> str:
        record["continues"] = True
        return "cut" if status is None else "passed"

    long = gpu.Unit("long", lambda own: [sys.executable, "-c", say.format("a") + wait], 1.0, read)
    found = gpu.work([stage(gpu, long, unit(gpu, "short", say.format("b")))], 1.0, tmp_path)
    assert found["stages"]["fake"]["state"] == "passed" and log.read_text() == "aba"


def test_gpu_runs_chosen_units(gpu: Any, tmp_path: Path) -> None:
    """The others stay as they are, and the stage is not done."""
    units = [unit(gpu, name, "pass") for name in ("softmax", "rope", "rope_qk")]
    gpu.work([stage(gpu, *units)], 1.0, tmp_path, only="rope")
    found = gpu.work([stage(gpu, *units)], 1.0, tmp_path, only="rope$")["stages"]["fake"]
    assert [u["state"] for u in found["units"].values()] == ["pending", "passed", "passed"]
    assert found["state"] == "unfinished"


def test_gpu_units_are_a_regular_expression(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--units", "rope ("])
    assert "--units: 'rope (' is no regular expression" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"units": 1}'])
def test_gpu_begins_anew_where_a_state_is_none(gpu: Any, tmp_path: Path, text: str) -> None:
    gpu.gpu_run.STATE.mkdir()
    (gpu.gpu_run.STATE / "fake.json").write_text(text)
    found = gpu.work([stage(gpu, unit(gpu, "good", "pass"))], 1.0, tmp_path)
    assert found["stages"]["fake"]["state"] == "passed"


def test_gpu_runs_units_at_a_time(gpu: Any, tmp_path: Path) -> None:
    """Two that wait for each other's file end; the output of each is its own."""
    code = """
import pathlib, sys, time
own, other = (pathlib.Path({folder!r}) / name for name in {names!r})
own.touch()
while not other.exists(): time.sleep(0.01)
print(own.name)
raise SystemExit(3)
"""
    units = [
        unit(gpu, f"unit {a}", code.format(folder=str(tmp_path), names=(a, b)))
        for a, b in (("one", "two"), ("two", "one"))
    ]
    two = gpu.Stage("fake", 5.0, lambda: units, workers=2)
    found = gpu.work([two], 1.0, tmp_path)["stages"]["fake"]["units"]
    assert {name: u["tail"].strip() for name, u in found.items()} == {
        "unit one": "one",
        "unit two": "two",
    }


def test_gpu_writes_after_each_unit(gpu: Any, tmp_path: Path) -> None:
    look = f"import json; x = json.load(open({str(tmp_path / 'fake.json')!r}))['units']; "
    second = look + "assert [u['state'] for u in x.values()] == ['passed', 'pending'], x"
    found = gpu.work([stage(gpu, unit(gpu, "a", "pass"), unit(gpu, "b", second))], 1.0, tmp_path)
    assert found["stages"]["fake"]["state"] == "passed", found


def test_gpu_without_an_install_runs_nothing(gpu: Any, tmp_path: Path) -> None:
    install = stage(gpu, unit(gpu, "pip", "raise SystemExit(3)"), name="install")
    found = gpu.work([install, stage(gpu, unit(gpu, "a", "pass"))], 1.0, tmp_path)
    assert found["stages"]["install"]["units"]["pip"]["status"] == 3
    assert found["stages"]["fake"] == {"state": "not run", "units": {}}


def test_gpu_stage_that_raises_is_recorded(gpu: Any, tmp_path: Path) -> None:
    broken = gpu.Stage("broken", 1.0, lambda: {}["units"])
    found = gpu.work([broken, stage(gpu, unit(gpu, "a", "pass"))], 1.0, tmp_path)
    assert found["stages"]["broken"]["state"] == "failed"
    assert "KeyError" in json.loads((tmp_path / "broken.json").read_text())["error"]
    assert found["stages"]["fake"]["state"] == "passed"


TESTS = """
import os, pytest
from pathlib import Path

@pytest.mark.parametrize("case", ["triton-1", "triton-2", "avx2-1"])
def test_good(case):
    Path(__file__).with_name("ran").open("a").write(case + "\\n")
@pytest.mark.parametrize("case", ["triton-bad"])
def test_bad(case):
    assert case == ""
@pytest.mark.parametrize("case", ["cuda-crash"])
def test_crash(case):
    os.abort()
@pytest.mark.parametrize("case", ["cuda-stays"])
def test_stays(case):
    raise RuntimeError("CUDA error: misaligned address\\nand more")
@pytest.mark.parametrize("case", ["triton-last"])
def test_last(case):
    pass
"""


def test_gpu_tests_go_on_after_a_crash(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.gpu_run, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    file = tmp_path / "test_fake.py"
    file.write_text(TESTS)
    command = gpu.partial(gpu.gpu_tests.test_command, [file], only="")
    tests = stage(
        gpu,
        gpu.Unit("test_fake", command, 60.0, gpu.gpu_tests.read_tests, gpu.gpu_tests.ENVIRONMENT),
    )
    found = gpu.work([tests], 1.0, tmp_path)["stages"]["fake"]["units"]["test_fake"]
    assert found["counts"] == {"passed": 3, "failed": 2, "crashed": 1}
    assert sorted(x.split("::")[1] for x in found["failures"]) == [
        "test_bad[triton-bad]: AssertionError: assert 'triton-bad' == ''",
        "test_crash[cuda-crash]",
        "test_stays[cuda-stays]: RuntimeError: CUDA error: misaligned address",
    ]
    assert found["state"] == "failed"
    ran = (tmp_path / "ran").read_text().split()
    assert sorted(ran) == ["triton-1", "triton-2"], "each once, devices only"


def test_gpu_a_test_hangs_that_uses_a_limit_alone(gpu: Any) -> None:
    """The one that runs when the time is up may only have been late; next time it comes first."""
    first, late = "tests/a.py::test_a[triton x]", "tests/a.py::test_b[triton]"
    record: dict[str, Any] = {}
    assert gpu.gpu_tests.read_tests(record, f"{first} PASSED [ 10%]\n{late} ", None) == "cut"
    assert record["counts"] == {"passed": 1} and record["seen"] == [first]
    assert gpu.gpu_tests.read_tests(record, f"collected 2 items\n\n{late} ", None) == "cut"
    assert record["failures"] == [f"HUNG {late}"] and record["seen"] == [first, late]
    assert gpu.gpu_tests.read_tests(record, "", 5) == "failed"
    starting: dict[str, Any] = {}
    assert [gpu.gpu_tests.read_tests(starting, "", None) for _ in range(3)] == [
        "cut",
        "cut",
        "failed",
    ]


def test_gpu_no_test_is_no_success(gpu: Any) -> None:
    assert gpu.gpu_tests.read_tests({}, "collected 0 items\n", 5) == "failed"
    assert gpu.gpu_tests.read_tests({}, "tests/a.py::test_a[triton] PASSED [100%]\n", 0) == "passed"


def test_gpu_architectures(gpu: Any) -> None:
    given = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
    assert [gpu.architecture(*c) for c in given] == ["80", "89", "90a", "100a", "120"]


def test_gpu_bench_record(gpu: Any) -> None:
    """A wrong provider is in the record, the run in the summary, and a run without JSON is none."""
    row = {"results": [{"provider": "llmops", "note": "WRONG: by 2"}]}
    result = {"machine": {"gpu": "g"}, "runs": [{"complete": False, "rows": [row]}]}
    gpu.gpu_run.STATE.mkdir()
    (gpu.gpu_run.STATE / "bench-unit.json").write_text(json.dumps(result))
    record: dict[str, Any] = {}
    record["state"] = gpu.read_bench(record, "", 1)
    assert record["state"] == "failed" and record["wrong"] == ["WRONG: by 2"]
    assert not record["complete"]
    gpu.save("bench", {"units": {"softmax": record}, "state": "failed"}, gpu.gpu_run.STATE)
    found = gpu.summary(["bench"])
    assert found["machine"] == {"gpu": "g"} and found["runs"][0]["stage"] == "softmax"
    gpu.bench_command(["softmax"], {})
    assert not (gpu.gpu_run.STATE / "bench-unit.json").exists(), (
        "no unit reads another one's result"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_gpu_without_a_gpu(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not gpu.gpu_run.STATE.exists(), "nothing was run"


def test_gpu_stages_exist(gpu: Any) -> None:
    """The real units can be listed here: names of files with the kit, of benchmarks with cases."""
    from llmops.bench import cases

    tests = [u.name for u in gpu.gpu_tests.test_units()]
    first = "(matches_reference or gradients)"
    wanted = {f"test_attention triton and {first} and bf16", f"test_rope triton and {first}"}
    ours = "test_softmax cuda and not triton and not far_strides"
    assert wanted | {ours, "test_device compiles", "kit triton and far_strides"} <= set(tests)
    assert tests.index(ours) < min(tests.index(name) for name in wanted), "nothing is compiled"
    assert tests[0] == "test_device not compiles" and len(tests) == len(set(tests))
    names = [u.name for u in gpu.bench_units()]
    assert set(cases.names()) <= set(names) and "attention torch.compile" in names
    assert {u.name for u in gpu.tune_units()} <= set(cases.known())
    with pytest.raises(SystemExit):
        gpu.main(["--stages", "benches"])


def test_gpu_tune_record(gpu: Any) -> None:
    found = ["softmax (1024, torch.bfloat16): {'ROWS': 4}, 1.20x", "rope ('q', 8): the table"]
    record: dict[str, Any] = {}
    assert gpu.read_tune(record, "0 configurations\n" + "\n".join(found) + "\n", 0) == "passed"
    assert record["found"] == found and gpu.read_tune({}, "", None) == "cut"


def test_gpu_sanitizer_units(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit per tool and op of the CUDA backend; a report fails it, and so does no test at all."""
    sanitize = sys.modules["gpu_sanitize"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="compute-sanitizer is not on PATH.*--stages"):
        list(sanitize.units("python"))
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    units = {u.name: u for u in sanitize.units("python")}
    for name in ("memcheck test_softmax", "racecheck test_attention", "synccheck test_rms_norm"):
        command = units[name].command({})
        assert command[:3] == [str(tool), "--tool", name.split()[0]]
        assert command[-1] == f"tests/{name.split()[1]}.py" and "cuda and" in command[-2]
    for text, status, want in (
        ("a.py::test[cuda] PASSED", 0, "passed"),
        ("no tests ran", 5, "failed"),
        ("========= Invalid __global__ read\na.py::test[cuda] PASSED", 77, "failed"),
        ("", None, "cut"),
    ):
        record: dict[str, Any] = {}
        assert sanitize.read(record, text, status) == want
        assert bool(record["reports"]) == ("Invalid" in text)
    assert "sanitize" not in gpu.USUAL
