"""Who may import whom, and what a plain import costs: the rules of the layout, enforced."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmops"

# Layer of each module of the package; a module imports only from lower layers (or its own package).
LAYERS = {
    "backends._extension": 0,
    "reference": 0,
    "kernels": 0,
    "backends": 1,
    "dispatch": 2,
    "ops": 3,
    "": 4,  # llmops/__init__.py
    "kv_cache": 5,
    "nn": 5,
    "distributed": 5,
    "model": 6,
    "integrations": 6,
    "pretrained": 7,
    "tokenizer": 8,
    "testing": 5,
    "testing.__main__": 6,
    "bench": 8,
    "report": 7,
    "demo": 9,
    "cli": 10,
    "__main__": 11,
}


def layer_of(module: str) -> int:
    parts = module.split(".")
    while parts:
        if ".".join(parts) in LAYERS:
            return LAYERS[".".join(parts)]
        parts.pop()
    return LAYERS[""]


def imports_at_load(file: Path) -> set[str]:
    """llmops modules imported when the file is loaded: not inside functions or TYPE_CHECKING."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import):
                found.update(a.name for a in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
                found.update(f"{node.module}.{a.name}" for a in node.names)
            elif isinstance(node, ast.If):
                if "TYPE_CHECKING" not in ast.unparse(node.test):
                    visit(node.body)
                visit(node.orelse)
            elif isinstance(node, (ast.Try, ast.With, ast.ClassDef)):
                visit(node.body)

    visit(ast.parse(file.read_text()).body)
    modules = set()
    for name in found:
        if name != "llmops" and not name.startswith("llmops."):
            continue
        relative = name.removeprefix("llmops").removeprefix(".")
        path = PACKAGE / relative.replace(".", "/")
        if path.is_dir() or path.with_suffix(".py").exists() or not relative:
            modules.add(relative)
    return modules


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_layering_of_python(file: Path) -> None:
    module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__")
    module = module.removesuffix(".")
    own = layer_of(module)
    for imported in imports_at_load(file):
        if imported == "" and own < LAYERS[""]:
            continue  # `from llmops import reference` names the package on the way to a module
        same_package = imported.split(".")[0] == module.split(".")[0]
        assert same_package or layer_of(imported) < own, f"{module} must not import {imported}"


@pytest.mark.parametrize("file", sorted((PACKAGE / "reference").glob("*.py")), ids=lambda f: f.stem)
def test_layering_reference_imports_torch_only(file: Path) -> None:
    modules = {
        (n.module or "") if isinstance(n, ast.ImportFrom) else n.names[0].name
        for n in ast.walk(ast.parse(file.read_text()))
        if isinstance(n, (ast.Import, ast.ImportFrom))
    }
    allowed = {"__future__", "math", "typing", "collections.abc"}
    assert all(
        m.split(".")[0] == "torch" or m.startswith("llmops.reference.") or m in allowed
        for m in modules
    ), modules


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_layering_kernels_see_no_torch(folder: str) -> None:
    for file in (ROOT / "csrc" / folder).iterdir():
        text = file.read_text()
        assert "#include <torch" not in text and "#include <ATen" not in text, file
        if folder == "cpu" and file.stem != "isa":
            for header in ("<cmath>", "<algorithm>", "<vector>", "<string>", "<cstdint>"):
                assert f"#include {header}" not in text, f"{file}: {header} brings weak symbols"


def test_layering_ptx_only_in_its_wrappers() -> None:
    """The simulator has a twin of each wrapper, and of nothing else."""
    wrapper = re.compile(r"^(?:__device__ __forceinline__|inline) \w+ (\w+)\(", re.MULTILINE)
    for file in (ROOT / "csrc").rglob("*"):
        if file.is_file() and file.name != "ptx.h":
            assert not re.search(r"\basm\b", file.read_text()), f"{file}: PTX belongs into ptx.h"
    wrappers = set(wrapper.findall((ROOT / "csrc" / "cuda" / "ptx.h").read_text()))
    twins = set(wrapper.findall((ROOT / "tests" / "cuda_sim" / "ptx_twins.h").read_text()))
    wrappers.remove("shared_address")  # the others' own
    assert wrappers == twins - {"widened", "mma", "ldmatrix"}
    used = "".join(f.read_text() for f in (ROOT / "csrc" / "cuda").iterdir() if f.name != "ptx.h")
    assert not [name for name in wrappers if f"{name}(" not in used and f"{name}<" not in used]


def test_layering_one_op_one_file_per_layer() -> None:
    """`find . -name '*softmax*'` leads to all of softmax."""
    import llmops

    specs = {f.stem for f in (PACKAGE / "testing" / "specs").glob("*.py")}
    for op in llmops.OPERATORS:
        home = getattr(llmops, op).__module__.removeprefix("llmops.ops.")
        assert (PACKAGE / "ops" / f"{home}.py").exists(), op
        assert home in specs or op in specs, f"{op} has no spec in llmops/testing/specs"
        assert (ROOT / "tests" / f"test_{home}.py").exists(), f"tests/test_{home}.py is missing"


def in_fresh_python(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_layering_plain_import_is_lean() -> None:
    """A plain import loads no optional part, and works where triton cannot be imported."""
    code = (
        "import sys, json; sys.modules['triton'] = None\n"
        "import torch, time; start = time.perf_counter(); before = set(sys.modules)\n"
        "import llmops\n"
        "cost = time.perf_counter() - start\n"
        "print(json.dumps([sorted(set(sys.modules) - before), cost]))"
    )
    loaded, _ = json.loads(in_fresh_python(code))
    heavy = ("llmops.cli", "llmops.model", "llmops.nn", "llmops.bench", "llmops.testing")
    heavy += ("llmops.integrations", "llmops.distributed")
    heavy += ("transformers", "tokenizers", "gguf", "numpy", "torch._dynamo", "torch._inductor")
    found = [m for m in loaded if m.startswith(heavy)]
    assert not found, found


def test_layering_import_adds_little_to_torch() -> None:
    """Ratio, not seconds: importing llmops on top of torch costs under a fifth of torch itself."""
    code = (
        "from time import perf_counter as t; a = t(); import torch; b = t(); import llmops; "
        "c = t(); "
        "print((c - b) / (b - a))"
    )
    ratios = sorted(float(in_fresh_python(code)) for _ in range(5))
    assert ratios[2] < 0.2, ratios


def test_hugging_face_kernels_and_transformers_import_from_the_root() -> None:
    assert importlib.util.find_spec("transformers"), "pip install transformers"
    print(in_fresh_python("import transformers, llmops; print(transformers.__version__)"))


def test_environment_variables_select_backend_and_isa() -> None:
    code = (
        "import torch, llmops; from llmops.backends import cpu\n"
        "print(llmops.explain('softmax', torch.ones(2, 2)).backend, cpu.isa())"
    )
    assert in_fresh_python(code, LLMOPS_BACKEND="reference").split()[0] == "reference"
    for isa in ("scalar", "avx2"):
        assert in_fresh_python(code, LLMOPS_CPU_ISA=isa).split()[1] == isa
    with pytest.raises(AssertionError, match=r"LLMOPS_CPU_ISA.*scalar, avx2.*'sse9'"):
        in_fresh_python(code, LLMOPS_CPU_ISA="sse9")
    with pytest.raises(AssertionError, match=r"LLMOPS_BACKEND.*got 'gpu'"):
        in_fresh_python(code, LLMOPS_BACKEND="gpu")


def test_environment_variables_are_documented() -> None:
    """CONTRIBUTING's table names every variable that the code reads, and no other of ours."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py"), *(ROOT / "tools").glob("*.py")]
    files += [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.cpp")]
    files += (ROOT / "kernels").rglob("*.py")
    reading = re.compile(r'(?:environ(?:\.get)?[\[(]|getenv\()"(\w+)"')
    read = {name for file in files for name in reading.findall(file.read_text())}
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Environment variables")[1]
    documented = set(re.findall(r"`([A-Z_0-9]+)`", table.split("\n## ")[0]))
    assert {n for n in read if n.startswith("LLMOPS")} == {
        n for n in documented if n.startswith("LLMOPS")
    }
    assert read - documented <= {"CUDA_PATH"}  # another name of CUDA_HOME


def test_no_test_hides_one_of_the_conformance_kit() -> None:
    """A module's own test of a kit test's name would replace it without a word."""
    from llmops.testing import specs
    from llmops.testing._suite import checks_of

    kit = {f"test_{s.name}_{c}" for s in specs.every().values() for c in checks_of(s)}
    for file in (ROOT / "tests").glob("test_*.py"):
        own = {n.name for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef)}
        assert not own & kit, f"{file.name}: rename {own & kit}, which the kit defines, too"


def test_kernel_objects_share_no_symbols() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import check_objects
    finally:
        sys.path.pop(0)
    assert check_objects.offending_symbols(ROOT / "build" / "objects") == []
