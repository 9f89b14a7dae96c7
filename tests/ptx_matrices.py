"""The matrix products of ptx_emulator.py: wgmma and mma.sync of 16-bit values with fp32 sums, by
the register fragments, matrix descriptors and swizzles of the PTX manual."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from ptx_values import BASE, floats

_SWIZZLE = {1: (128, 7), 2: (64, 3), 3: (32, 1)}  # of a descriptor: bytes of a row, bits that turn


def _names(text: str) -> list[list[str]]:
    return [[x.strip() for x in found.split(",")] for found in re.findall(r"\{([^}]*)\}", text)]


def _floats(words: Any, kind: str) -> Any:
    return floats(words.astype(np.uint16), kind).astype(np.float32)


def described(block: Any, descriptor: int, rows: int, turned: bool, kind: str) -> Any:
    """[rows, 16] of shared memory; turned: neighbours are along the rows' dimension."""
    start, step = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    width, turn = _SWIZZLE[descriptor >> 62]
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if turned:
        aside, wide = (descriptor >> 16 & 0x3FFF) << 4, width // 2  # from atom to atom along rows
        at = k % 8 * width + k // 8 * step + row % wide * 2 + row // wide * aside
    else:
        at = row % 8 * width + row // 8 * step + k * 2
    at = start + at
    at = (at ^ (at >> 7 & turn) << 4) - BASE
    assert at.min() >= 0 and at.max() + 2 <= block.bytes.size
    block.multiply(at)
    low, high = (block.bytes[at + j].astype(np.uint16) for j in (0, 1))
    return _floats(low | high << 8, kind)


def _fragment(block: Any, names: list[str], lanes: Any, kind: str, rows: int) -> Any:
    """A of registers, [rows, 16]: four words a thread, warps one below the other."""
    own = np.zeros((rows, 16), np.float32)
    lane, warp = np.arange(lanes.size) % 32, np.arange(lanes.size) // 32
    row, column = 16 * warp + lane // 4, 2 * (lane % 4)
    for name, (down, right) in zip(names, ((0, 0), (8, 0), (0, 8), (8, 8)), strict=True):
        word = block.registers[name][lanes]
        for j in (0, 1):
            half = (word >> 16 * j).astype(np.uint16)
            own[row + down, column + right + j] = _floats(half, kind)
    return own


def _add(block: Any, names: list[str], lanes: Any, product: Any, keep: bool) -> None:
    """The fp32 fragment of a product [16 * warps, N], to what is there or in its place."""
    lane, warp = np.arange(lanes.size) % 32, np.arange(lanes.size) // 32
    row, column = 16 * warp + lane // 4, 2 * (lane % 4)
    for i, name in enumerate(names):
        down, right = 8 * (i % 4 // 2), 8 * (i // 4) + i % 2
        value = product[row + down, column + right]
        register = block.registers.get(name, np.zeros(block.threads, np.uint32)).copy()
        if keep:
            value = value + register[lanes].view(np.float32)
        register[lanes] = value.astype(np.float32).view(np.uint32)
        block.registers[name] = register


def wgmma(block: Any, op: str, text: str) -> None:
    n, kind = int(re.search(r"m64n(\d+)k16", op)[1]), op.rsplit(".", 1)[1]  # type: ignore[index]
    groups = _names(text)
    rest = [x.strip() for x in text[text.rindex("}") + 1 :].split(",") if x.strip()]
    a = groups[1] if len(groups) == 2 else rest.pop(0)
    b, keep, turned = rest[0], rest[1], [int(x) for x in rest[4:]]  # after two signs
    for first in range(0, block.threads, 128):
        lanes = np.arange(first, first + 128)
        if isinstance(a, list):
            left, of_b = _fragment(block, a, lanes, kind, 64), turned[0]
        else:
            left = described(block, int(block.registers[a][first]), 64, bool(turned[0]), kind)
            of_b = turned[1]
        right = described(block, int(block.registers[b][first]), n, bool(of_b), kind)
        kept = bool(block.registers[keep][first]) if keep[0] == "%" else keep != "0"
        product = left.astype(np.float64) @ right.astype(np.float64).T
        _add(block, groups[0], lanes, product, kept)


def mma(block: Any, op: str, text: str) -> None:
    assert ".m16n8k16.row.col.f32" in op, op
    kind = op.split(".")[-2]
    d, a, b, c = _names(text)
    for name, source in zip(d, c, strict=True):
        block.registers[name] = block.registers[source].copy()
    for first in range(0, block.threads, 32):
        lanes = np.arange(first, first + 32)
        lane = np.arange(32)
        right = np.zeros((8, 16), np.float32)
        for i, name in enumerate(b):
            word = block.registers[name][lanes]
            for j in (0, 1):
                half = (word >> 16 * j).astype(np.uint16)
                right[lane // 4, 2 * (lane % 4) + 8 * i + j] = _floats(half, kind)
        left = _fragment(block, a, lanes, kind, 16)
        _add(block, d, lanes, left.astype(np.float64) @ right.astype(np.float64).T, True)
