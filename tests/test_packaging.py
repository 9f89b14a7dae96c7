"""Installs, each as a user would do it, in environments of their own.

One full build takes a minute or two, so the steps share one copy of the tree and one environment
where that is how they are used, and the compiler does not optimize.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
USE = (
    "import torch, llmops; y = llmops.softmax(torch.randn(3, 5), backend='cpu'); "
    "assert torch.allclose(y.sum(-1), torch.ones(3)); "
    "import llmops.kernels.triton; print(llmops.__file__)"
)

# How fast the kernels are is no matter here, and these flags come last.
BUILD = {"CXXFLAGS": "-O0"}

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, **environment: str) -> str:
    """The command's output; raises with all of it where it fails."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "LLMOPS_CUDA")
    }
    result = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command} failed:\n{result.stdout[-8000:]}"
    return result.stdout


def new_environment(folder: Path) -> Path:
    """A fresh virtual environment's python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the source tree, unbuilt."""
    target = tmp_path_factory.mktemp("tree") / "llmops-src"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in listed:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def bare(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pip install torch==2.13.0 .` in a bare environment, with build isolation."""
    python = new_environment(tmp_path_factory.mktemp("bare") / "env")
    run(python, "-m", "pip", "install", TORCH, ".", cwd=tree, **BUILD)
    return python


@pytest.fixture(scope="module")
def artifacts(bare: Path, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, and the wheel built from that sdist alone."""
    folder = tmp_path_factory.mktemp("artifacts")
    run(bare, "-m", "pip", "install", "build", "setuptools>=77", "ninja", cwd=folder)
    run(bare, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, tree, cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    run(bare, "-m", "pip", "wheel", "--no-deps", "-w", folder, sdist, cwd=folder, **BUILD)
    return folder


def test_install_bare_environment(bare: Path, tmp_path: Path) -> None:
    assert "site-packages" in run(bare, "-c", USE, cwd=tmp_path)
    assert "usable" in run(bare.parent / "llmops", "info", cwd=tmp_path)


def test_install_beside_torch_downloads_no_second_torch(bare: Path, tree: Path) -> None:
    options = ("-v", "--force-reinstall", "--no-deps")
    log = run(bare, "-m", "pip", "install", *options, ".", cwd=tree, **BUILD)
    assert "Successfully installed llmops-kernels" in log
    assert not re.search(r"(Collecting|Downloading|Processing) .*\btorch\b", log), log[-4000:]


def test_source_tree_says_it_is_unbuilt(bare: Path, tree: Path) -> None:
    """In the repository root Python finds the source package before the installed one."""
    said = run(bare, "-W", "always", "-c", "import llmops; print(llmops.backends())", cwd=tree)
    assert "has no compiled kernels" in said and "pip install -e ." in said
    # Nothing else breaks: the reference still serves, and says so.
    used = run(bare, "-c", "import torch, llmops; llmops.softmax(torch.ones(2, 2))", cwd=tree)
    assert "runs on the reference" in used


def test_kernels_name_is_left_alone(bare: Path, tree: Path) -> None:
    """The folder kernels/ must not be importable as a package: that name is another project's."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    assert run(bare, "-c", code, cwd=tree).splitlines()[-1] == "None"


def test_sdist_is_complete(artifacts: Path) -> None:
    (sdist,) = artifacts.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    wanted = {"setup.py", "csrc/cpu/simd.h", "csrc/bindings/softmax.cpp", "tools/build_backend.py"}
    wanted |= {"kernels/triton/__init__.py", "llmops/reference/softmax.py", "LICENSE", "README.md"}
    assert wanted <= names, wanted - names


@pytest.fixture(scope="module")
def from_wheel(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with the wheel in it, installed where there is no compiler."""
    (wheel,) = artifacts.glob("*.whl")
    folder = tmp_path_factory.mktemp("no-compiler")
    python = new_environment(folder / "env")
    run(python, "-m", "pip", "install", TORCH, wheel, cwd=folder, **no_compiler(python))
    return python


def no_compiler(python: Path) -> dict[str, str]:
    return {"PATH": str(python.parent), "CXX": "/bin/false", "CC": "/bin/false"}


def test_wheel_is_abi3_and_works_without_a_compiler(
    artifacts: Path, from_wheel: Path, tmp_path: Path
) -> None:
    (wheel,) = artifacts.glob("*.whl")
    assert "cp310-abi3-linux" in wheel.name, wheel.name
    used = run(from_wheel, "-c", USE, cwd=tmp_path, **no_compiler(from_wheel))
    assert "site-packages" in used


def test_bench_runs_from_an_installed_wheel(from_wheel: Path, tmp_path: Path) -> None:
    """In plain lines, as rich is not there either."""
    options = ("softmax", "--quick", "--seconds", "0.01", "--json", "r.json", "--html", "r.html")
    run(from_wheel.parent / "llmops", "bench", *options, cwd=tmp_path, **no_compiler(from_wheel))
    result = json.loads((tmp_path / "r.json").read_text())
    rows = result["runs"][0]["rows"]
    assert rows and all(row["ours_us"] and row["torch_us"] for row in rows)
    assert result["machine"]["commit"] is None  # no source tree, no commit
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_editable_without_isolation(bare: Path, tree: Path, tmp_path: Path) -> None:
    """Last, as it builds inside the tree."""
    options = ("-v", "--no-build-isolation")
    log = run(bare, "-m", "pip", "install", *options, "-e", ".", cwd=tree, **BUILD)
    assert "Successfully installed llmops-kernels" in log
    assert str(tree) in run(bare, "-c", USE, cwd=tmp_path)
    # From the root too, now that the tree is built.
    assert str(tree) in run(bare, "-c", USE, cwd=tree)


def test_touching_one_kernel_rebuilds_only_it(bare: Path, tree: Path) -> None:
    (tree / "csrc/cpu/softmax.cpp").touch()
    log = run(bare, "setup.py", "build_ext", "--inplace", cwd=tree, **BUILD)
    built = re.findall(r"^\[\d+/\d+\] cxx .*/(\S+\.o)$", log, re.MULTILINE)
    assert {b.split(".")[0] for b in built} <= {"softmax"}, log[-3000:]


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_library_needs_libtorch_and_no_cuda(bare: Path, tmp_path: Path) -> None:
    code = "import llmops, glob; print(glob.glob(llmops.__path__[0] + '/_C*')[0])"
    library = run(bare, "-c", code, cwd=tmp_path).splitlines()[-1]  # after torch's warnings
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    assert "libtorch.so" in needed.stdout and "libcuda" not in needed.stdout
