"""What a reader needs to place the numbers: machine, versions, clocks, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import llmops
from llmops.backends import _extension
from llmops.bench.limits import last_level_cache, transparent_huge_pages


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpuinfo(field: str) -> list[str]:
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    return [x.split(":", 1)[1].strip() for x in lines if x.startswith(field) and ":" in x]


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run(*command: str) -> str | None:
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def commit() -> str | None:
    """The source tree's commit, where there is one; "+" where it was changed since."""
    root = Path(llmops.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    head = _run("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    # What README and the results say does not change what was measured.
    sources = ("llmops", "csrc", "kernels", "setup.py")
    changed = _run("git", "-C", str(root), "status", "--porcelain", "-uno", "--", *sources)
    return None if head is None else head + ("+" if changed else "")


def _clocks() -> dict[str, Any]:
    """MHz now and at most, and the governor, where they can be read; virtual machines hide most."""
    now = sorted(float(x) for x in _cpuinfo("cpu MHz"))
    scaling = "/sys/devices/system/cpu/cpu0/cpufreq"
    most = _read(f"{scaling}/cpuinfo_max_freq")
    return {
        "mhz_now": now[len(now) // 2] if now else None,
        "mhz_max": int(most) / 1000 if most else None,
        "governor": _read(f"{scaling}/scaling_governor"),
    }


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties()
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    device = str(getattr(properties, "uuid", ""))
    chosen = [f"--id=GPU-{device}"] if device else []
    found = _run("nvidia-smi", *chosen, f"--query-gpu={fields}", "--format=csv,noheader") or ""
    return {
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_l2_mib": properties.L2_cache_size / 2**20,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        # Read right after the measuring, before the clocks fall back.
        **dict(zip(fields.split(","), map(str.strip, found.split(",")), strict=False)),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    loaded = _extension.REASON is None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": (_cpuinfo("model name") or [platform.processor()])[0],
        "isa": str(torch.ops.llmops_cpu.isa_active()) if loaded else "none",
        "cores": cores(),
        "memory_gib": round(memory / 2**30, 1),
        "last_level_cache_mib": last_level_cache() / 2**20,
        "transparent_huge_pages": transparent_huge_pages(),
        "clocks": _clocks(),
        **_gpu(),
        "system": f"{platform.system()} {platform.release()}",
        "torch": torch.__version__,
        "llmops": llmops.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def machine_class(machine: dict[str, Any], device: str = "cpu") -> str:
    """The name of the committed result's file: of the CPU, though there be a GPU beside it."""
    if device == "cuda":
        return "cuda-" + "-".join(str(machine["gpu"]).lower().split())
    return f"cpu-{str(machine['isa']).replace('_', '-')}-{machine['cores']}core"
