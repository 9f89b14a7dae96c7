"""What is usable here, and where not, why and what to do: `llmops info`."""

from __future__ import annotations

import platform
from typing import Any

import torch

import llmops
from llmops.backends import _extension, get

KERNEL_BACKENDS = ("cpu", "triton", "cuda")


def backends() -> dict[str, str | None]:
    """Each backend's name with None where it is usable, else the reason it is not."""
    return {name: get(name).available() for name in (*KERNEL_BACKENDS, "reference")}


def info() -> dict[str, Any]:
    """Versions, devices and backends, as `llmops info` prints them."""
    loaded = _extension.REASON is None
    return {
        "llmops": llmops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu_isa": torch.ops.llmops_cpu.isa_active() if loaded else None,
        "cpu_isa_best": torch.ops.llmops_cpu.isa_best() if loaded else None,
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": backends(),
        "operators": list(llmops.OPERATORS),
    }


def text() -> str:
    found = info()
    lines = [
        f"llmops {found['llmops']}, torch {found['torch']}, Python {found['python']}, "
        f"{found['threads']} threads",
        f"CPU instruction set: {found['cpu_isa'] or 'none (no compiled extension)'}"
        + (f" (best here: {found['cpu_isa_best']})" if found["cpu_isa"] else ""),
        f"CUDA devices: {', '.join(found['cuda_devices']) or 'none'}",
    ]
    for name, reason in found["backends"].items():
        lines.append(f"  {name:10} " + ("usable" if reason is None else f"not usable: {reason}"))
    return "\n".join(lines)
