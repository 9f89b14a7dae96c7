"""Runs the PTX of a compiled Triton kernel on the CPU: what the interpreter cannot show, Triton's
own lowering, is in it (layouts, swizzles, masks, matrix products by register fragments), and only
the assembler's work is not.

A block at a time, its threads as vectors of numpy; of threads that branched apart those behind go
first, until they meet. Every access must be aligned and inside one tensor, or inside shared memory,
which begins as NaN; asynchronous copies land when they are waited for. Covers the instructions of
the kernels that tests/test_triton_ptx.py runs; another one ends the run by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import ptx_tma
import torch
from ptx_matrices import mma, wgmma
from ptx_values import BASE, POISON, SHARED, UNSIGNED, Memory, Value, bits, floats, numbers, signed


class Block:
    def __init__(self, program: Program, memory: Memory, arguments: list[Any]) -> None:
        self.program, self.memory, self.arguments = program, memory, arguments
        self.threads = program.threads
        self.bytes = np.full(SHARED, POISON, np.uint8)
        self.shared = Memory()
        self.shared.add(self.bytes, BASE)
        self.registers: dict[str, Value] = {}
        self.copies: list[list[Callable[[], None]]] = [[]]
        self.barriers: dict[int, ptx_tma.Barrier] = {}
        self.mask = np.ones(self.threads, bool)
        self.index = (0, 0, 0)

    # ---- operands

    def get(self, name: str, width: int) -> Value:
        kind = UNSIGNED[width]
        if name.startswith("%tid"):
            return np.arange(self.threads, dtype=kind) * (name[-1] == "x")
        if name.startswith("%ctaid"):
            return np.full(self.threads, self.index["xyz".index(name[-1])], kind)
        if name.startswith("%nctaid"):
            return np.full(self.threads, self.program.grid["xyz".index(name[-1])], kind)
        if name.startswith("%"):
            return self.registers[name]
        if "_param_" in name:  # its address, in a space of its own
            return np.full(self.threads, int(name.rsplit("_", 1)[1]), kind)
        if name == "global_smem":
            return np.full(self.threads, BASE, kind)
        number = int(name[2:], 16) if name[:2] in ("0f", "0d") else int(name.rstrip("U"), 0)
        return np.full(self.threads, number & ((1 << width) - 1), kind)

    def set(self, name: str, value: Value) -> None:
        """Where the instruction's predicate holds."""
        old = self.registers.get(name)
        if old is not None and not self.mask.all():
            value = np.where(self.mask, value, old)
        self.registers[name] = value

    # ---- memory

    def access(self, space: str, text: str) -> tuple[Memory, Value]:
        found = re.search(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        assert found, text
        address = self.get(found[1], 64 if space == "global" else 32).astype(np.int64)
        return self.memory if space == "global" else self.shared, address + int(found[2] or 0)

    def moved(self, kind: str, text: str) -> list[str]:
        """The registers that a load fills, or a store empties."""
        inside = re.search(r"\{([^}]*)\}", text)
        plain = text.split(",")[0] if kind == "ld" else text.rsplit(",", 1)[1]
        return [x.strip() for x in (inside[1] if inside else plain).split(",")]

    def move(self, kind: str, space: str, width: int, text: str) -> None:
        where, address = self.access(space, text)
        names, size = self.moved(kind, text), width // 8
        if not self.mask.any():
            return
        if (address[self.mask] % (size * len(names))).any():
            raise AssertionError(f"{text}: no multiple of {size * len(names)}")
        for i, name in enumerate(names):
            at = address[self.mask] + i * size
            if kind == "ld":
                own = UNSIGNED[max(width, 16)]  # a register holds a byte as 16 bits
                old = self.registers.get(name, np.zeros(self.threads, own)).copy()
                old[self.mask] = where.load(at, size, text).view(UNSIGNED[width])[:, 0]
                self.registers[name] = old
            else:
                data = self.get(name, width)[self.mask].astype(UNSIGNED[width])
                where.store(at, data.view(np.uint8).reshape(-1, size), text)

    def copy_later(self, text: str) -> None:
        to, source, size, *kept = [x.strip() for x in text.split(",")]
        _, target = self.access("shared", to)
        _, origin = self.access("global", source)
        total = int(size, 0)
        much = self.get(kept[0], 32) if kept else np.full(self.threads, total, np.uint32)
        for given in {int(n) for n in much[self.mask]}:
            some = self.mask & (much == given)
            data = np.zeros((int(some.sum()), total), np.uint8)
            if given:
                data[:, :given] = self.memory.load(origin[some], given, text)
            at = target[some]
            self.copies[-1].append(lambda a=at, d=data: self.shared.store(a, d, text))

    def wait(self, pending: int) -> None:
        done = max(len(self.copies) - 1 - pending, 0)  # the last is not committed
        for group in self.copies[:done]:
            for copy in group:
                copy()
        del self.copies[:done]

    def matrices(self, op: str, text: str) -> None:
        """ldmatrix and stmatrix: 8 x 8 values of 16 bits, a row at the address of each thread."""
        count, turned = int(op.split(".x")[1][0]), ".trans" in op
        names = [x.strip() for x in text.split("{")[1].split("}")[0].split(",")]
        _, address = self.access("shared", text)
        for warp in range(self.threads // 32):
            lanes = slice(32 * warp, 32 * warp + 32)
            lane = np.arange(32)
            for i in range(count):
                rows = address[lanes][8 * i : 8 * i + 8]
                if op.startswith("ld"):
                    tile = self.shared.load(rows, 16, text).view(np.uint16)
                else:
                    tile = np.zeros((8, 8), np.uint16)
                pair = (lane // 4, 2 * (lane % 4))
                own = [(pair[0], pair[1] + j) for j in (0, 1)]
                own = [(c, r) for r, c in own] if turned else own
                if op.startswith("ld"):
                    low, high = (tile[at].astype(np.uint32) for at in own)
                    value = self.registers.setdefault(names[i], np.zeros(self.threads, np.uint32))
                    value = value.copy()
                    value[lanes] = low | high << 16
                    self.registers[names[i]] = value
                else:
                    word = self.get(names[i], 32)[lanes]
                    for j, at in enumerate(own):
                        tile[at] = (word >> 16 * j).astype(np.uint16)
                    self.shared.store(rows, tile.view(np.uint8), text)

    def multiply(self, at: Value) -> None:
        """Told of the bytes, in pairs, that a wgmma reads from shared memory."""

    def arriving(self, at: Value, warp: int, text: str) -> Callable[[], None]:
        """Told of the bytes that TMA will change; what it returns is called when it has."""
        return lambda: None

    # ---- the rest

    def arithmetic(self, op: str, parts: list[str], given: list[str]) -> Value:
        kind = parts[-1]
        if kind.endswith("x2"):
            words = [self.get(g, 32) for g in given]
            low, high = (rounded(op, [h(w) for w in words], kind[:-2]) for h in HALVES)
            return low.astype(np.uint32) | high.astype(np.uint32) << 16
        width = int(re.sub(r"\D", "", kind) or 32)
        if (kind[0] == "f" or kind == "bf16") and op not in ("selp", "mov"):
            return rounded(op, [self.get(g, width) for g in given], kind)
        x = [self.get(g, width) for g in given]
        if op in ("mul", "mad") and "wide" in parts:
            a, b = (numbers(self.get(g, 32), kind) for g in given[:2])
            product = (a.astype(np.int64) * b.astype(np.int64)).view(np.uint64)
            return product + self.get(given[2], 64) if op == "mad" else product
        if op == "mad":
            return x[0] * x[1] + x[2]
        if op in ("shl", "shr"):
            a = numbers(x[0], kind)
            by = self.get(given[1], 32).astype(a.dtype)
            return (a << by if op == "shl" else a >> by).view(x[0].dtype)
        if op == "bfe":
            at, count = int(given[1]), int(given[2])
            value = x[0] >> np.uint32(at) & np.uint32((1 << count) - 1)
            negative = (value >> np.uint32(count - 1)).astype(bool) & (kind[0] == "s")
            above = np.uint32(-1 << count & 0xFFFFFFFF)
            return np.where(negative, value | above, value).astype(np.uint32)
        if op == "prmt":  # each byte of the result is one of the eight, or all its sign
            pair = x[0].astype(np.uint64) | x[1].astype(np.uint64) << np.uint64(32)
            pair, found = pair.view(np.uint8).reshape(-1, 8), np.empty((self.threads, 4), np.uint8)
            for i in range(4):
                which = x[2] >> np.uint32(4 * i) & np.uint32(15)
                byte = np.take_along_axis(pair, (which & 7).astype(np.int64)[:, None], 1)[:, 0]
                found[:, i] = np.where(which & 8, (byte >> 7) * np.uint8(255), byte)
            return found.view(np.uint32)[:, 0]
        values = [numbers(v, kind) for v in x]
        found = INTEGER[op](*values)
        if "relu" in parts:
            found = np.maximum(found, 0)
        return found.view(x[0].dtype)

    def convert(self, parts: list[str], given: list[str]) -> Value:
        if parts[-2].endswith("x2"):
            kind = parts[-2].removesuffix("x2")
            high, low = (bits(floats(self.get(g, 32), "f32"), kind) for g in given)
            return high.astype(np.uint32) << 16 | low
        to, source = parts[-2], parts[-1]
        x = self.get(given[0], int(re.sub(r"\D", "", source)))
        x = numbers(x, source)
        if "f" in to:
            return bits(x.astype(np.float64 if to == "f64" else np.float32), to)
        width = int(re.sub(r"\D", "", to))
        return x.astype(np.int64).astype(UNSIGNED[width])

    def step(self, text: str, active: Value) -> str | None:
        """One instruction of some threads; where those of the mask go on, if not at the next."""
        found = re.match(r"@(!?)(%p\d+)\s+(.*)$", text)
        self.mask = active
        if found:
            holds = self.registers[found[2]]
            self.mask = active & (~holds if found[1] else holds)
            text = found[3]
        if text.startswith("@!complete"):  # a wait that failed has raised
            return None
        full, _, rest = text.replace("\t", " ").partition(" ")
        parts, rest = full.split("."), rest.strip()
        op, given = parts[0], [x.strip() for x in rest.split(",")]
        if op == "bra":
            return given[0]
        if full.startswith(TOGETHER) and not active.all():
            raise AssertionError(f"{text}: not all threads are here")
        if op in ("bar", "fence", "membar") or full.startswith(WAITS):
            return None
        if full.startswith("wgmma.mma_async"):
            wgmma(self, full, rest)
        elif full.startswith("mma.sync"):
            mma(self, full, rest)
        elif op in ("ldmatrix", "stmatrix"):
            self.matrices(full, rest)
        elif op == "elect" or "mbarrier" in full:
            ptx_tma.step(self, full, rest)
        elif full.startswith("cp.async"):
            if "commit_group" in full:
                self.copies.append([])
            elif "wait_group" in full:
                self.wait(int(rest))
            else:
                self.copy_later(rest)
        elif op == "ld" and parts[1] == "param":
            index = int(re.search(r"param_(\d+)", rest)[1])  # type: ignore[index]
            self.set(given[0], self.parameter(index, 64 if given[0].startswith("%rd") else 32))
        elif op in ("ld", "st"):
            self.move(op, parts[1].split("::")[0], int(re.sub(r"\D", "", parts[-1])), rest)
        elif op == "mov" and "{" in rest:
            width = int(parts[-1][1:])
            whole, half = UNSIGNED[width], UNSIGNED[width // 2]
            if rest.startswith("{"):
                word = self.get(given[2], width)
                self.set(given[0][1:].strip(), word.astype(half))
                self.set(given[1][:-1].strip(), (word >> whole(width // 2)).astype(half))
            else:
                low, high = (self.get(x.strip(" {}"), width // 2) for x in given[1:])
                self.set(given[0], low.astype(whole) | high.astype(whole) << whole(width // 2))
        elif parts[-1] == "pred":
            x = [self.get(g, 32).astype(bool) for g in given[1:]]
            self.set(given[0], {"mov": lambda a: a, "not": lambda a: ~a, **LOGIC}[op](*x))
        elif op == "setp":
            kind = parts[-1].removesuffix("x2")
            if kind != parts[-1]:  # two predicates, of the lower halves and of the upper ones
                words = [self.get(g, 32) for g in given[1:]]
                for name, half in zip(given[0].split("|"), HALVES, strict=True):
                    self.set(name, COMPARE[parts[1]](*(numbers(half(w), kind) for w in words)))
                return None
            x = [self.get(g, int(re.sub(r"\D", "", kind))) for g in given[1:]]
            self.set(given[0], COMPARE[parts[1]](*(numbers(v, kind) for v in x)))
        elif op == "selp":
            width = int(re.sub(r"\D", "", parts[-1]))
            yes, no = (self.get(g, width) for g in given[1:3])
            self.set(given[0], np.where(self.registers[given[3]], yes, no))
        elif op == "shfl":
            lane, other = np.arange(self.threads), self.get(given[2], 32).astype(np.int64)
            source = {"bfly": lane ^ other, "idx": lane // 32 * 32 + other % 32}[parts[2]]
            self.set(given[0].split("|")[0], self.get(given[1], 32)[source])
        elif op == "redux":
            x = signed(self.get(given[1], 32)).reshape(-1, 32)
            best = {"max": x.max, "min": x.min, "add": x.sum}[parts[2]](axis=1)
            self.set(given[0], np.repeat(best, 32).astype(np.int32).view(np.uint32))
        elif op == "cvt":
            self.set(given[0], self.convert(parts, given[1:]))
        elif op in ("mov", "cvta"):
            self.set(given[0], self.get(given[-1], int(re.sub(r"\D", "", parts[-1]) or 32)))
        else:
            self.set(given[0], self.arithmetic(op, parts, given[1:]))
        return None

    def parameter(self, index: int, width: int) -> Value:
        value = self.arguments[index] if index < len(self.arguments) else 0  # scratch: none
        if isinstance(value, float):
            kind = np.float64 if width == 64 else np.float32
            return np.full(self.threads, value, kind).view(UNSIGNED[width])
        return np.full(self.threads, value & ((1 << width) - 1), UNSIGNED[width])

    def run(self, index: tuple[int, int, int]) -> None:
        self.index, lines = index, self.program.lines
        at = np.zeros(self.threads, np.int64)
        with np.errstate(all="ignore"):
            while True:
                here = int(at.min())
                if lines[here] == "ret":
                    return
                active = at == here
                try:
                    to = self.step(lines[here], active)
                except KeyError as missing:
                    name = f"{lines[here]}: the emulator lacks {missing}"
                    raise NotImplementedError(name) from None
                at[active] = here + 1
                if to is not None:
                    at[self.mask] = self.program.labels[to]


def rounded(op: str, x: list[Value], kind: str) -> Value:
    """The bits of a floating-point instruction's result."""
    values = [floats(v, kind) for v in x]
    if op != "fma":
        return bits(FLOAT[op](*values), kind)
    exact = values[0].astype(np.longdouble) * values[1] + values[2]  # one rounding
    return bits(exact.astype(values[0].dtype), kind)


HALVES = (lambda x: x.astype(np.uint16), lambda x: (x >> np.uint32(16)).astype(np.uint16))
TOGETHER = ("bar", "wgmma", "mma", "ldmatrix", "stmatrix", "shfl", "redux", "cp.async.wait")
WAITS = ("wgmma.fence", "wgmma.commit", "wgmma.wait", "griddepcontrol")
LOGIC = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}
COMPARE: dict[str, Any] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b), "equ": lambda a, b: ~((a < b) | (a > b)),
    "eq": np.equal, "ne": lambda a, b: (a != b) & (a == a) & (b == b), "neu": np.not_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip
FLOAT: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.fmax,
    "min": np.fmin, "neg": np.negative, "abs": np.abs, "ex2": np.exp2, "lg2": np.log2,
    "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "rcp": lambda x: 1 / x,
}  # fmt: skip
INTEGER: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum,
    "not": np.invert, "neg": np.negative, "abs": np.abs, **LOGIC,
    "div": lambda a, b: np.trunc(a / b).astype(a.dtype), "rem": np.fmod,
}  # fmt: skip


class Program:
    def __init__(self, ptx: str) -> None:
        self.lines: list[str] = []
        self.labels: dict[str, int] = {}
        found = re.search(r"\.reqntid (\d+)", ptx)
        assert found, "no number of threads"
        self.threads = int(found[1])
        body = ptx[ptx.index("{", ptx.index(".reqntid")) + 1 : ptx.rindex("}")]
        for line in body.splitlines():
            text = line.split("//")[0].strip()
            if text.endswith(":"):
                self.labels[text[:-1]] = len(self.lines)
                continue
            # Inline code has braces of its own, and several instructions to a line.
            text = text[1:-1] if text.startswith("{ ") else text
            self.lines += (x for x in map(str.strip, text.split(";")) if x and x[0] not in ".{}")


def run(ptx: str, grid: tuple[int, ...], arguments: list[Any], block: type[Block] = Block) -> None:
    """Runs all blocks; `arguments` are the kernel's, tensors on the CPU, which it changes."""
    program, memory = Program(ptx), Memory()
    x, y, z = program.grid = (*grid, 1, 1)[:3]
    passed: list[Any] = []
    for value in arguments:
        if isinstance(value, torch.Tensor):
            content = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy()
            passed.append(memory.add(content) + value.storage_offset() * value.element_size())
        elif isinstance(value, ptx_tma.TensorMap):
            content = torch.empty(0, dtype=torch.uint8).set_(value.tensor.untyped_storage()).numpy()
            offset = value.tensor.storage_offset() * value.tensor.element_size()
            value.address = memory.add(content) + offset
            passed += [value, *value.shape, *value.strides]
        else:
            passed.append(value)
    for k in range(z):
        for j in range(y):
            for i in range(x):
                block(program, memory, passed).run((i, j, k))
