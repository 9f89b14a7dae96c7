"""What ptx_emulator.py computes with: a register of all threads, and memory that is watched."""

from __future__ import annotations

from typing import Any

import numpy as np

SHARED = 232448  # bytes that a block of sm_90 may have
BASE = 1024  # where shared memory begins, as on the device
POISON = 0x7F  # bytes: NaN in every type
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
Value = Any  # a vector of one unsigned integer, or bool, per thread


def signed(x: Value) -> Value:
    return x.view({1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[x.dtype.itemsize])


def floats(x: Value, kind: str) -> Value:
    if kind == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind])


def numbers(x: Value, kind: str) -> Value:
    """As the type of an instruction says: s32, u64, b16, f32."""
    if kind[0] == "f" or kind == "bf16":
        return floats(x, kind)
    return signed(x) if kind[0] == "s" else x


def bits(x: Value, kind: str) -> Value:
    if kind == "bf16":
        wide = np.ascontiguousarray(x, np.float32).view(np.uint32)
        rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)
    kinds = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
    x = np.ascontiguousarray(x, kinds[kind])
    return x.view(UNSIGNED[8 * x.dtype.itemsize])


class Memory:
    """Bytes by address: some tensors, or one stretch of shared memory."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, Any]] = []

    def add(self, content: Any, at: int | None = None) -> int:
        """Its address, far from all others."""
        at = (len(self.pieces) + 1) << 32 if at is None else at
        self.pieces.append((at, content))
        return at

    def _where(self, address: Value, size: int, what: str) -> tuple[Any, Value]:
        lowest, highest = int(address.min()), int(address.max()) + size
        for begin, content in self.pieces:
            if begin <= lowest and highest <= begin + content.size:
                if (address % size).any():
                    raise AssertionError(f"{what}: an address is no multiple of {size}")
                return content, (address - begin).astype(np.int64)[:, None] + np.arange(size)
        raise AssertionError(f"{what}: {lowest:#x} to {highest:#x} is inside no tensor")

    def load(self, address: Value, size: int, what: str) -> Value:
        content, at = self._where(address, size, what)
        return np.ascontiguousarray(content[at])

    def store(self, address: Value, data: Value, what: str) -> None:
        content, at = self._where(address, data.shape[1], what)
        content[at] = data
