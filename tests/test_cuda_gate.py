"""tools/cuda_gate.py: what the table of registers and shared memory lets pass, and what not."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def gate() -> Any:
    spec = importlib.util.spec_from_file_location("cuda_gate", ROOT / "tools" / "cuda_gate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(gate: Any) -> Any:
    return json.loads(gate.TABLE.read_text())


def test_cuda_gate_table_has_every_kernel_on_every_architecture(table: Any) -> None:
    sources = "".join(f.read_text() for f in (ROOT / "csrc" / "cuda").glob("*.cu"))
    for name, entries in table.items():
        assert set(entries) == {"sm_80", "sm_90a", "sm_100a", "sm_120"}, name
        assert f"{name.split('<')[0]}(" in sources, f"{name} is no kernel of csrc/cuda"


def test_cuda_gate_compares(gate: Any, table: Any) -> None:
    assert gate.compare(table, table) == []
    one = {name: {"sm_80": entries["sm_80"]} for name, entries in table.items()}
    assert gate.compare(one, table) == []  # LLMOPS_CUDA_ARCHS=80
    name = sorted(table)[0]
    for key, more, bad in (("registers", gate.SLACK, 0), ("registers", 9, 1), ("shared", 1, 1)):
        changed = copy.deepcopy(table)
        changed[name]["sm_90a"][key] += more
        assert len(gate.compare(changed, table)) == bad, (key, more)
    fewer = {k: v for k, v in table.items() if k != name}
    assert gate.compare(fewer, table) == [f"{name}: no longer there"]
    assert gate.compare(table, fewer) == [f"{name}: not in the table"]


def test_cuda_gate_holds_products_to_tensor_cores(gate: Any, table: Any) -> None:
    kernels = {name for name in table if name.split("<")[0] in gate.TENSOR}
    assert {name.split("<")[0] for name in kernels} == set(gate.TENSOR)
    for name, entries in table.items():
        held = {where: e["products"] for where, e in entries.items() if "products" in e}
        assert set(held) == (set(entries) if name in kernels else set()), name
        assert all(held.values()), name
    name = sorted(kernels)[0]
    for where in table[name]:
        changed = copy.deepcopy(table)
        changed[name][where]["products"] //= 3
        assert len(gate.compare(changed, table)) == 1, where
        uncounted = copy.deepcopy(table)  # as tables of before have it
        del uncounted[name][where]["products"]
        assert gate.compare(changed, uncounted) == []
    assert gate.PRODUCT.search("  /*0420*/   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;")
    assert not gate.PRODUCT.search("  /*0420*/   FFMA R4, R8, R12, R4 ;")


def test_cuda_gate_counts_products_on_each_architecture(
    gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = "  /*0420*/   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;\n"
    code = {
        "sm_100a": f"\t\tFunction : _Z3one\n{product * 3}\t\tFunction : _Z3two\n{product}",
        "sm_120": f"\t\tFunction : _Z3one\n{product * 2}",
        "sm_80": f"\t\tFunction : _Z3two\n{product}\t\tFunction : _Z3one\n  FFMA R4, R8, R12 ;\n",
    }
    asked: list[tuple[str, list[str]]] = []

    def disassembled(library: Path, architecture: str, functions: list[str]) -> str:
        asked.append((architecture, functions))
        return code[architecture]

    monkeypatch.setattr(gate, "disassembled", disassembled)
    one, two = "attention_fwd_kernel<1>", "attention_dmask_kernel<2>"
    table: dict[str, dict[str, dict[str, int]]] = {
        one: {where: {} for where in code},
        two: {"sm_100a": {}, "sm_80": {}},
        "gelu_kernel": {where: {} for where in code},
    }
    mangled = {"_Z3one": one, "_Z3two": two, "_Z4gelu": "gelu_kernel"}
    broken = gate.count_products(Path("no library"), table, mangled)
    assert asked == [
        ("sm_100a", ["_Z3one", "_Z3two"]), ("sm_120", ["_Z3one"]), ("sm_80", ["_Z3one", "_Z3two"]),
    ]  # fmt: skip
    assert {a: e["products"] for a, e in table[one].items()} == {
        "sm_100a": 3, "sm_120": 2, "sm_80": 0,
    }  # fmt: skip
    assert {a: e["products"] for a, e in table[two].items()} == {"sm_100a": 1, "sm_80": 1}
    assert not any(table["gelu_kernel"].values())
    assert len(broken) == 1 and broken[0].startswith(f"{one} on sm_80: no ")


def test_cuda_gate_writes_only_what_the_library_has(
    gate: Any, table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLMOPS_CUDA_ARCHS=80 make cuda CUDA=--write."""
    file = tmp_path / "cuda.json"
    file.write_text(gate.TABLE.read_text())
    first, gone = sorted(table)[:2]
    library = {k: {"sm_80": dict(e["sm_80"])} for k, e in table.items() if k != gone}
    library[first]["sm_80"]["registers"] = 255
    library["new_kernel"] = {"sm_80": {"registers": 1, "shared": 0}}
    monkeypatch.setattr(gate, "TABLE", file)
    monkeypatch.setattr(gate, "usage", lambda _: (library, []))
    monkeypatch.setattr("sys.argv", ["cuda_gate.py", "library", "--write"])
    assert gate.main() == 0
    want = copy.deepcopy(table)
    del want[gone]
    want[first]["sm_80"]["registers"] = 255
    want["new_kernel"] = library["new_kernel"]
    assert json.loads(file.read_text()) == want
    monkeypatch.setattr("sys.argv", ["cuda_gate.py", "library"])
    assert gate.main() == 0


@pytest.fixture(scope="module")
def gencode() -> Any:
    """setup.py's, which cannot be imported."""
    text = (ROOT / "setup.py").read_text()
    scope: dict[str, Any] = {"re": re}
    exec(re.findall(r"^CUDA_ARCHS = .*$", text, re.MULTILINE)[0], scope)
    exec(text[text.index("def gencode(") : text.index("def quote(")], scope)
    return scope["gencode"]


def test_cuda_architectures_of_the_build(gencode: Any) -> None:
    assert re.findall(r"code=(\S+)", gencode("90a")) == ["sm_90a", "compute_90a"]
    every = gencode("80;90a;100a;120")
    assert every.count("code=sm_") == 4 and every.count("code=compute_") == 2
    for none in ("", " ", ";"):  # an empty variable, as a script sets it
        assert gencode(none) == every
    assert gencode("90a;90a, 90a") == gencode("90a")


@pytest.mark.parametrize("archs", ["sm_90", "9.0", "all", "90b", "75", "80;70", "-90"])
def test_cuda_architectures_that_are_none(gencode: Any, archs: str) -> None:
    with pytest.raises(SystemExit, match=r"LLMOPS_CUDA_ARCHS: '.*' is no architecture"):
        gencode(archs)
