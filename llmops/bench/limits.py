"""What this machine can do, measured in the same run as the rows that are held against it.

CPU: copy (the faster of torch's and one whose stores bypass the caches), read, and multiply-add
rate, by loops with nothing else in them (csrc/cpu/limits.cpp), on the threads the run has and the
instruction set that is active. A bf16 rate above the fp32 one exists where the set has the bf16
pair product. CUDA: a device copy and matrix products in bf16 (for 16-bit rows) and in
fp32 (for fp32 rows, not rounded to TF32), both torch's.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from llmops.backends import _extension
from llmops.bench.clock import timed

MEBIBYTE = 1 << 20


def last_level_cache(device: str = "cpu") -> int:
    """Bytes, 0 where it cannot be read."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    # The C library reads 0 on some virtual machines where the kernel knows.
    for level, index in ((3, 3), (2, 2)):
        with contextlib.suppress(ValueError, OSError, AttributeError):
            size = os.sysconf(f"SC_LEVEL{level}_CACHE_SIZE")
            if size > 0:
                return size
        with contextlib.suppress(ValueError, OSError):
            text = Path(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size").read_text().strip()
            return int(text.removesuffix("K").removesuffix("M")) * (
                MEBIBYTE if text.endswith("M") else 1024
            )
    return 0


def _best(call: Any, rounds: int = 5, device: str = "cpu") -> float:
    call()
    # A call that is queued on a GPU is timed with those after it: one alone is mostly launch.
    number = 1 if device == "cpu" else max(1, min(50, int(0.02 / timed(call, 1))))
    return min(timed(call, number) for _ in range(rounds))


class Limits:
    """copy_gbs, read_gbs in GB/s; flops(dtype) in GFLOP/s; as_json() has them all with their names.

    `megabytes` is the size of the copied buffer, far above the last-level cache.
    """

    def __init__(self, device: str = "cpu", megabytes: int = 0) -> None:
        size = megabytes or min(max(256, 4 * last_level_cache(device) // MEBIBYTE), 1024)
        source = torch.ones(size * MEBIBYTE // 4, device=device)
        target = torch.empty_like(source)
        moved = 2 * source.numel() * 4
        self.device = device
        self.how: dict[str, float] = {}
        self.how["torch copy GB/s"] = (
            moved / _best(lambda: target.copy_(source), device=device) / 1e9
        )
        self.copy_gbs = self.read_gbs = self.how["torch copy GB/s"]
        if device == "cpu" and _extension.REASON is None:
            raw = torch.ops.llmops_cpu
            seconds = _best(lambda: raw.copy_peak(source, target))
            self.how["non-temporal copy GB/s"] = moved / seconds / 1e9
            self.how["read GB/s"] = moved / 2 / _best(lambda: raw.read_peak(source)) / 1e9
            self.copy_gbs = max(self.copy_gbs, self.how["non-temporal copy GB/s"])
            # Reading alone cannot be slower than reading and writing.
            self.read_gbs = max(self.how["read GB/s"], self.copy_gbs)
        self._flops: dict[torch.dtype, float] = {}

    def flops(self, dtype: torch.dtype) -> float:
        """Multiply-add rate, GFLOP/s. 16-bit inputs without a pair product of their own are widened
        and multiplied in fp32, so fp32's rate is their limit."""
        if dtype not in self._flops:
            if self.device != "cpu":
                if dtype == torch.float32:
                    self._flops[dtype] = self._product(dtype, 4096)
                else:
                    rate = self.how.get("bfloat16 matrix product GFLOP/s")  # fp16 has the same
                    self._flops[dtype] = rate or self._product(torch.bfloat16, 8192)
            elif _extension.REASON is not None:
                self._flops[dtype] = self._product(dtype, 1024)
            else:
                pairs = self._fma(True) if dtype == torch.bfloat16 else 0.0
                self._flops[dtype] = pairs or self._fma(False)
        return self._flops[dtype]

    def _fma(self, pairs: bool) -> float:
        name = "bf16 pair FMA GFLOP/s" if pairs else "fp32 FMA GFLOP/s"
        if name in self.how:
            return self.how[name]
        raw, iterations = torch.ops.llmops_cpu.fma_peak, 1 << 20
        flops = raw(pairs, 1)
        if flops:
            flops = raw(pairs, iterations)
            self.how[name] = flops / _best(lambda: raw(pairs, iterations), 7) / 1e9
        return self.how.get(name, 0.0)

    def _product(self, dtype: torch.dtype, n: int) -> float:
        # Random: a GPU multiplies ones with less power and so at a higher clock than real data.
        a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        rate = 2 * n**3 / _best(lambda: a @ b, 7, self.device) / 1e9
        self.how[f"{str(dtype)[6:]} matrix product GFLOP/s"] = rate
        return rate

    def bound(
        self, bytes: int, flops: int, dtype: torch.dtype, read_only: bool
    ) -> tuple[str, float]:
        """Which limit bounds that much work, and the seconds it takes at the limit; ("", 0.0) for
        none."""
        gbs = self.read_gbs if read_only else self.copy_gbs
        memory = bytes / gbs / 1e9
        compute = flops / self.flops(dtype) / 1e9 if flops else 0.0
        if compute > memory:
            return "flops", compute
        if not bytes:
            return "", 0.0
        return "read" if read_only else "copy", memory

    def as_json(self) -> dict[str, float]:
        return {
            "copy_gbs": self.copy_gbs,
            "read_gbs": self.read_gbs,
            **{f"flops_{str(d)[6:]}_gflops": rate for d, rate in self._flops.items()},
            **self.how,
        }


def transparent_huge_pages() -> str | None:
    """The system's setting: always, madvise or never."""
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        return file.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return None
