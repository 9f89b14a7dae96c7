"""What tools/aot.py compiles, and how: the launches of the calls of tools/aot_calls, recorded with
meta tensors; what Triton would specialize each on; and what the compiled program says of itself.

tools/aot_calls/<op>.py says at which shapes: `calls(make, call)` with make(*shape) a meta tensor of
the dtype in turn (make(..., dtype=...) of another) and call(label, launcher, *args, **kwargs)
running a launcher of llmops.backends.triton, whose result it returns. Triton's own binder then
makes of each launch the specialization that it would compile on a GPU, and each distinct one is an
entry of the table.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sass

ROOT = Path(__file__).resolve().parent.parent
# Kernels that the interpreter wraps cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "aot")
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

import torch  # noqa: E402
import triton  # noqa: E402
from llmops.kernels.triton import _config, _launch, _rows  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from llmops.backends import get  # noqa: E402
from llmops.kernels import triton as kernels  # noqa: E402

TARGETS = {
    **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100, 120)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx90a", "gfx942", "gfx950")},
}
VERSION = triton.__version__
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# fp16 is compiled like bf16, so that one target tells.
FP16_TARGETS = ("sm_90",)
Entry = dict[str, Any]  # registers, spills, shared, instructions, config; moved where there is


@dataclass(frozen=True)
class Job:
    """One specialization of a kernel, to be compiled for one target."""

    name: str  # of its entry: "softmax softmax_fwd bf16 4096x1024 sm_90", the first word the op's
    target: str
    source: Any
    options: dict[str, Any]
    config: str
    spills: str | None  # why it may spill

    def result(self) -> Entry:
        compiled = triton.compile(self.source, TARGETS[self.target], self.options)
        measure = _nvidia if self.target.startswith("sm") else _amd
        entry = {**measure(compiled.asm), "shared": compiled.metadata.shared, "config": self.config}
        entry["product"] = _rows_of_products(compiled.asm["ttir"])
        entry["described"] = any(
            "tensordesc" in str(kind) for kind in self.source.signature.values()
        )
        return entry


def _rows_of_products(ttir: str) -> int:
    """Of the largest product of 16-bit values; 0 where there is none."""
    found = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(?:b?f16)>", ttir)
    return max(map(int, found), default=0)


def _nvidia(asm: Any) -> Entry:
    """From the program itself: a spill is an access of local memory."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def dump(what: str, tool: str = "cuobjdump") -> str:
        command = [str(tools / tool), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, program = dump("--dump-resource-usage"), dump("--dump-sass")
        undefined = sass.undefined(dump("-c", "nvdisasm")) if "HGMMA" in program else []
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    instructions = re.findall(r"\b(HGMMA|HMMA|UTCHMMA|UTMALDG|UTMASTG|LDGSTS)\b", program)
    wide = re.findall(r"\b(LDG|STG)\.(?:\w+\.)*128\b", program)
    return {
        "registers": int(found[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", program)),
        "instructions": sorted({*instructions, *(f"{w}.128" for w in wide)}),
        **({"undefined": undefined[:3]} if undefined else {}),
    }


def _amd(asm: Any) -> Entry:
    text = asm["amdgcn"]

    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found[1])

    wide = re.findall(r"\b(?:global|buffer)_(load|store)_dwordx4\b", text)
    names = {"mfma"} if re.search(r"\bv_mfma_", text) else set()
    entry = {"registers": value("vgpr_count"), "spills": 0}
    moved = value("vgpr_spill_count") + value("sgpr_spill_count")
    if moved:
        entry["spills" if value("private_segment_fixed_size") else "moved"] = moved
    return {**entry, "instructions": sorted(names | {f"{w}.128" for w in wide})}


# ---- what to compile -----------------------------------------------------------------------------


class Make:
    """Meta tensors of one dtype: make(4096, 1024); make(4096, dtype=torch.int64)."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def lengths(self, longest: int = _rows.LONGEST) -> list[int]:
        """Of the rows of a table, the longest of each bracket; of fp16 one, as bf16 tells."""
        return [longest] if self.dtype == torch.float16 else _rows.lengths(longest)


def ops() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules([str(ROOT / "tools" / "aot_calls")]))


Choice = tuple[str, str, Any, Any]  # target, op, key, configuration


def _choice(target: str, op: str, key: Any, config: dict[str, Any]) -> Choice:
    return target, op, key, tuple(sorted(config.items()))


def _recording(target: str) -> Any:
    return _launch.recording(target.replace("sm_", "sm"))


class Recorder:
    """Runs the calls of aot_calls for a target and a dtype; keeps each specialization once."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.launchers: set[str] = set()
        self.kernels: set[str] = set()
        self.choices: set[Choice] = set()
        self._seen: set[Any] = set()

    def run(self, op: str, target: str, tag: str) -> None:
        module = importlib.import_module(f"aot_calls.{op}")

        def call(label: str, launcher: str, *args: Any, **kwargs: Any) -> Any:
            self.launchers.add(launcher)
            with _recording(target) as launches, _config.watching() as choices:
                result = getattr(get("triton"), launcher)(*args, **kwargs)
            self.choices |= {_choice(target, *choice) for choice in choices}
            if not launches:
                raise AssertionError(f"{op}: {launcher} {label} launched no kernel")
            for launch in launches:
                self._keep(launch, op, f"{tag} {label}", target, module)
            return result

        module.calls(Make(DTYPES[tag]), call)

    def _keep(self, launch: Any, op: str, label: str, target: str, module: Any) -> None:
        self.kernels.add(launch.kernel.__name__)
        source, options, key = _specialize(launch, label, target)
        # Per op, though ops share kernels: the entries of an op are the same in a run of it alone.
        if (op, key, target) in self._seen:
            return
        self._seen.add((op, key, target))
        kernel = launch.kernel.__name__.removesuffix("_kernel")
        # Where a label has several forms of a kernel, they are numbered.
        names = (f"{op} {kernel}{f'#{i}' if i > 1 else ''} {label} {target}" for i in range(1, 100))
        name = next(n for n in names if n not in self.jobs)
        spills = getattr(module, "SPILLS", {}).items()
        why = next((why for what, why in spills if f"{kernel} {label}".startswith(what)), None)
        config = " ".join(f"{k}={v}" for k, v in sorted(launch.constants.items()))
        self.jobs[name] = Job(name, target, source, options, config, why)


def record(names: Iterable[str], targets: Iterable[str]) -> Recorder:
    recorder = Recorder()
    for target in targets:
        for name in names:
            for tag in DTYPES:
                if tag != "fp16" or target in FP16_TARGETS:
                    recorder.run(name, target, tag)
    return recorder


def _specialize(launch: Any, label: str, target: str) -> tuple[Any, dict[str, Any], Any]:
    """The source that Triton would compile for this launch, its options, and what tells it from
    others."""
    kernel = launch.kernel
    grid = (*launch.grid, 1, 1)[:3]
    if grid[0] >= 2**31 or max(grid[1:]) >= 2**16:
        raise AssertionError(f"{kernel.__name__} {label}: a grid of {grid} is beyond CUDA's")
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.constants)
    _, signature, constants, attributes = kernel._pack_args(
        backend, dict(launch.constants), bound, specialization, options
    )
    key = (kernel.__name__, str(signature), str(constants), str(attributes), str(options))
    return ASTSource(kernel, signature, constants, attributes), options, key


def unreached(choices: set[Choice], names: Iterable[str]) -> Iterator[str]:
    """Table entries that no call of these files of aot_calls looked up. fp16's are bf16's."""
    files = get("triton")._FILES
    for target, op in sorted({choice[:2] for choice in choices}):
        if files[op].removesuffix("_bwd") not in names:
            continue
        module = importlib.import_module(f"{kernels.__name__}.{files[op]}")
        with _recording(target):
            entries = [*module.entries(op, torch.float32), *module.entries(op, torch.bfloat16)]
        for entry in dict.fromkeys(_choice(target, op, *e) for e in entries):
            if entry not in choices:
                key = " ".join(str(part).removeprefix("torch.") for part in entry[2])
                config = " ".join(f"{name}={value}" for name, value in entry[3])
                what = "no call of tools/aot_calls looks it up"
                yield f"table entry {op} {key} {target} ({config}): {what}"


def missing(launchers: set[str], called: set[str]) -> Iterator[str]:
    """Launchers and kernels of the package that no call reached."""
    for name in sorted(set(get("triton")._FILES) - launchers):
        yield f"launcher {name}: no call of tools/aot_calls runs it"
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name == "_interpreter":
            continue
        inside = vars(importlib.import_module(f"{kernels.__name__}.{module.name}"))
        for name, value in inside.items():
            if isinstance(value, JITFunction) and name.endswith("_kernel") and name not in called:
                yield f"kernel {name} of {module.name}.py: no call of tools/aot_calls launches it"
