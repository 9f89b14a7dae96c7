"""Builds llmops._C: one library on torch's stable ABI and CPython's limited API.

A generated build.ninja compiles each CPU kernel source once per instruction set with that set's
flags, the bindings against torch's headers, and the CUDA sources with nvcc when they are wanted.
torch.utils.cpp_extension is not used: it knows no per-source flags, and switches CUDA off when the
torch at hand is a CPU build.

Environment: LLMOPS_CUDA=0|1 forces CUDA off or on, LLMOPS_CUDA_ARCHS="80;90a" narrows the targets,
LLMOPS_BUILD=0 builds no extension at all (reference only), MAX_JOBS limits parallel compilers,
LLMOPS_EMULATE_AVX512=1 is for `make test-emulated`, LLMOPS_SANITIZE=address|thread
(with LLMOPS_SANITIZE_ONLY, the first words of sources) for `make test-sanitized`.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# LibTorch's stable ABI as of torch 2.11: the library loads on that version and every later one.
TORCH_TARGET = "0x020b000000000000"
ISA_FLAGS = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl "
    "-mprefer-vector-width=512",
    "avx512_bf16": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 "
    "-mamx-tile -mamx-bf16 -mprefer-vector-width=512",
}
if not IS_X86:
    ISA_FLAGS = {"scalar": "-DLLMOPS_SCALAR_ONLY"}
# For tests on processors without AVX-512: its two copies, from the same sources, on AVX2; -O1
# halves the time it takes to compile.
EMULATED = os.environ.get("LLMOPS_EMULATE_AVX512", "0") == "1"
if EMULATED:
    emulation = f"{ISA_FLAGS['avx2']} -O1 -include {ROOT}/tests/emulation/avx512.h -D__AVX512F__"
    ISA_FLAGS["avx512"] = emulation
    ISA_FLAGS["avx512_bf16"] = f"{emulation} -D__AVX512BF16__ -D__AMX_BF16__"
# For tests: some sources' bindings and kernels, those of this processor's best instruction set,
# with a sanitizer. Address checks as calls, and no checks of null or alignment: each access inline
# costs minutes of compile time.
SANITIZE = os.environ.get("LLMOPS_SANITIZE", "")
SANITIZERS = {
    "": "",
    "address": "-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize=address,"
    "signed-integer-overflow,shift,integer-divide-by-zero,bounds,float-cast-overflow,unreachable "
    "--param asan-instrumentation-with-call-threshold=0",
    "thread": "-O1 -g1 -fno-omit-frame-pointer -fsanitize=thread",
}
SANITIZE_ONLY = tuple(os.environ.get("LLMOPS_SANITIZE_ONLY", "").split())
VARIANT = "emulated" if EMULATED else SANITIZE
COMMON = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -fno-math-errno"
# Kernels return, they do not throw, and own no static state that needs a guard. The last flag:
# GCC 12 warns of uninitialized values inside its own AVX-512 headers.
KERNEL = (
    "-fno-exceptions -fno-rtti -fno-threadsafe-statics -Wno-unknown-pragmas "
    "-Wno-maybe-uninitialized -Wno-uninitialized"
)
CUDA_ARCHS = "80;90a;100a;120"


def torch_root() -> Path:
    """The installed torch's folder, found without importing it.

    In an isolated build sys.path holds only the build requirements, but sysconfig still names the
    site-packages of the environment the wheel is for: that torch is the one to build against.
    """
    candidates = [Path(p) for p in sys.path if p]
    candidates += [Path(sysconfig.get_paths()[k]) for k in ("purelib", "platlib")]
    for folder in candidates:
        if (folder / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return folder / "torch"
    raise SystemExit(
        "llmops: building the extension needs torch >= 2.11 (its headers), and none was found in "
        f"{[str(c) for c in candidates]}. Install torch first, or set LLMOPS_BUILD=0 for a "
        "build without compiled kernels."
    )


def best_isa() -> str:
    """The last of ISA_FLAGS that this processor has, by the names of the Linux kernel."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    needs = {"avx512_bf16": "avx512_bf16", "avx512": "avx512vl", "avx2": "avx2"}
    return next((isa for isa, flag in needs.items() if flag in flags), "scalar")


def torch_cuda_version(root: Path) -> str | None:
    match = re.search(r"^cuda.*= '([\d.]+)'", (root / "version.py").read_text(), re.MULTILINE)
    return match.group(1) if match else None


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    return Path(found) if found else None


def nvcc_toolkit(nvcc: Path) -> Path:
    """The toolkit's folder as nvcc itself sees it: the nvcc on PATH may be a wrapper script."""
    text = subprocess.run(
        [str(nvcc), "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False
    ).stderr
    match = re.search(r"^#\$ TOP=(.+)$", text, re.MULTILINE)
    return Path(match.group(1)).resolve() if match else nvcc.resolve().parent.parent


def cuda_wanted(torch: Path) -> Path | None:
    choice = os.environ.get("LLMOPS_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"llmops: LLMOPS_CUDA must be 0 or 1, got {choice!r}")
    nvcc = find_nvcc()
    if choice == "1" and nvcc is None:
        raise SystemExit("llmops: LLMOPS_CUDA=1, but no nvcc is on PATH or under CUDA_HOME")
    if choice == "0" or nvcc is None or (choice == "auto" and torch_cuda_version(torch) is None):
        return None
    return nvcc


def gencode(archs: str) -> str:
    """nvcc flags: machine code for each architecture, PTX of the last for what comes later, and of
    the first for what lies between: sm_103 can take neither sm_100a's code nor sm_120's PTX. All
    of CUDA_ARCHS where none is named."""
    names = [a for a in dict.fromkeys(re.split(r"[;, ]+", archs)) if a] or CUDA_ARCHS.split(";")
    for name in names:
        # The tensor cores' instructions and cp.async begin with sm_80.
        if not re.fullmatch(r"\d+[af]?", name) or int(name.rstrip("af")) < 80:
            raise SystemExit(
                f"llmops: LLMOPS_CUDA_ARCHS: {name!r} is no architecture such as 90a, from 80 on"
            )
    flags = [f"-gencode arch=compute_{a},code=sm_{a}" for a in names]
    flags += [f"-gencode arch=compute_{a},code=compute_{a}" for a in sorted({names[0], names[-1]})]
    return " ".join(flags)


def quote(path: object) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """Writes build.ninja: rules with dependency files, so that touching a header rebuilds only
    what includes it."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5"]
        self.objects: list[Path] = []

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, output: Path, flags: str) -> None:
        self.lines += [f"build {quote(output)}: {rule} {quote(source)}", f"  flags = {flags}"]
        self.objects.append(output)

    def link(self, output: Path, flags: str) -> None:
        objects = " ".join(quote(o) for o in self.objects)
        self.lines += [f"build {quote(output)}: link {objects}", f"  flags = {flags}"]
        self.lines += [f"default {quote(output)}", ""]


class NinjaBuildExt(build_ext):  # type: ignore[misc]  # setuptools is untyped
    def build_extension(self, ext: Extension) -> None:
        if SANITIZE not in SANITIZERS or (EMULATED and SANITIZE):
            raise SystemExit(
                f"llmops: LLMOPS_SANITIZE must be address or thread, got {SANITIZE!r}, and goes "
                "without LLMOPS_EMULATE_AVX512"
            )
        if VARIANT and (self.distribution.commands != ["build"] or not IS_X86):
            raise SystemExit(
                "llmops: LLMOPS_EMULATE_AVX512 and LLMOPS_SANITIZE are for `make test-emulated` "
                "and `make test-sanitized` on x86-64; what they build is slow and is not to be "
                "installed. Unset them."
            )
        torch = torch_root()
        # Always the same folder, not setuptools' build_temp, which is a new one for each editable
        # install: whoever builds this tree again compiles only what changed.
        objects = ROOT / "build" / "objects"
        objects.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        nvcc = None if VARIANT else cuda_wanted(torch)
        # Build files over the same objects: what the builds have in common is compiled once.
        kind = f".{VARIANT}" if VARIANT else (".cuda" if nvcc else "")
        build_file = objects / f"build{kind}.ninja"
        text = self.ninja_text(torch, nvcc, objects, output)
        if not build_file.exists() or build_file.read_text() != text:
            build_file.write_text(text)
        command = [self.ninja(), "-C", str(objects), "-f", build_file.name]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run(command, check=True)

    @staticmethod
    def ninja() -> str:
        try:
            import ninja
        except ImportError:
            found = shutil.which("ninja")
            if found is None:
                raise SystemExit("llmops: the build needs ninja (pip install ninja)") from None
            return found
        return str(Path(ninja.BIN_DIR) / "ninja")

    def ninja_text(self, torch: Path, nvcc: Path | None, objects: Path, output: Path) -> str:
        cxx = os.environ.get("CXX", "c++")
        csrc = ROOT / "csrc"
        target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
        binding_flags = (
            f"{target} -I{quote(csrc)} -isystem {quote(torch / 'include')} "
            f"-isystem {quote(torch / 'include/torch/csrc/api/include')}"
        )
        file = NinjaFile()
        extra = os.environ.get("CXXFLAGS", "")
        file.rule("cxx", f"{cxx} -MMD -MF $out.d {COMMON} $flags {extra} -c $in -o $out")
        file.rule("link", f"{cxx} -shared $in $flags -o $out", depfile=False)
        python_include = f"-I{quote(sysconfig.get_paths()['include'])}"
        file.compile("cxx", csrc / "module.cpp", objects / "module.o", python_include)
        emulated = ".emulated" if EMULATED else ""
        sanitizer = SANITIZERS[SANITIZE]

        def sanitized(source: Path) -> bool:
            return bool(SANITIZE) and source.stem.startswith(SANITIZE_ONLY or "")

        define = f"{self.isa_define()} {'-DLLMOPS_EMULATED' if EMULATED else ''}"
        file.compile("cxx", csrc / "cpu" / "isa.cpp", objects / f"isa{emulated}.o", define)
        for source in sorted((csrc / "cpu").glob("*.cpp")):
            if source.name == "isa.cpp":
                continue
            for isa, flags in ISA_FLAGS.items():
                mark = emulated if "avx512" in isa else ""
                if sanitized(source) and isa == best_isa():
                    mark, flags = f".{SANITIZE}", f"{flags} {sanitizer}"
                obj = objects / f"{source.stem}.{isa}{mark}.o"
                file.compile("cxx", source, obj, f"-DLLMOPS_ISA={isa} {KERNEL} {flags}")
        bindings = {"binding": sorted((csrc / "bindings").glob("*.cpp"))}
        if nvcc:
            bindings["binding.cuda"] = sorted((csrc / "bindings" / "cuda").glob("*.cpp"))
        for kind, sources in bindings.items():
            for source in sources:
                flags, mark = f"{binding_flags} {self.isa_define()}", ""
                if sanitized(source):
                    mark, flags = f".{SANITIZE}", f"{flags} {sanitizer}"
                file.compile("cxx", source, objects / f"{kind}.{source.stem}{mark}.o", flags)
        libs = f"-L{quote(torch / 'lib')} -Wl,--no-as-needed -ltorch -Wl,--as-needed -ltorch_cpu"
        if nvcc:
            archs = gencode(os.environ.get("LLMOPS_CUDA_ARCHS", CUDA_ARCHS))
            file.rule(
                "nvcc",
                f"{quote(nvcc)} -MMD -MF $out.d -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"
                f" --expt-relaxed-constexpr -lineinfo {archs} $flags -c $in -o $out",
            )
            for source in sorted((csrc / "cuda").glob("*.cu")):
                file.compile("nvcc", source, objects / f"cuda.{source.stem}.o", "")
            toolkit = nvcc_toolkit(nvcc)
            folder = next((d for d in ("lib64", "lib") if (toolkit / d).is_dir()), "lib64")
            # Static runtime: the library loads where no CUDA is installed.
            libs += f" -L{quote(toolkit / folder)} -lcudart_static -ldl -lrt -lpthread"
        file.link(output, f"{libs} {sanitizer}")
        return "\n".join(file.lines)

    @staticmethod
    def isa_define() -> str:
        return "" if IS_X86 else "-DLLMOPS_SCALAR_ONLY"


BUILD = os.environ.get("LLMOPS_BUILD", "1") != "0"
setup(
    ext_modules=[Extension("llmops._C", ["csrc/module.cpp"], py_limited_api=True)] if BUILD else [],
    cmdclass={"build_ext": NinjaBuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if BUILD else {},
)
