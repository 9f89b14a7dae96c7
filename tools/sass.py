"""Uniform registers that a program for an NVIDIA GPU may read before anything has written them.

CUDA's assembler before 12.9.86, which Triton 3.6 and 3.7 bring for sm_90, takes the addresses of
some wgmma operands from such: wrong results with right PTX (benchmarks/NOTES.md). No test without a
GPU runs machine code, so the ahead-of-time gate reads it.

A data flow over the text of `nvdisasm -c`: what is written on every way to an instruction. A
conditional instruction counts as one that writes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_LINE = re.compile(r"\s*(?:/\*[0-9a-f]+\*/\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_USE = re.compile(r"(gdesc|desc)?\[?[-~|]?\bUR(\d+)\b(\.64)?")
_OPERANDS = re.compile(r",(?![^\[]*\])")
# Whose first operand is a uniform register, beside those that begin with U.
_WRITES = ("R2UR", "S2UR", "VOTEU", "REDUX", "CREDUX", "LDCU")
_NO_RESULT = ("UTM", "UBLK", "USETMAX", "UCGA")
_PAIRS = ("ULDC", "UIADD3", "UMOV", "USEL", "ULOP", "LDCU")  # with .64


class _Instruction(NamedTuple):
    guard: str
    name: str
    operands: str


def _registers(instruction: _Instruction) -> tuple[set[int], set[int]]:
    """Written and read."""
    name = instruction.name
    parts = _OPERANDS.split(instruction.operands)
    pairs = ".64" in name and name.startswith(_PAIRS)
    written: set[int] = set()
    read: set[int] = set()
    if name.startswith(_WRITES) or (name[0] == "U" and not name.startswith(_NO_RESULT)):
        for number in map(int, re.findall(r"\bUR(\d+)\b", parts[0])):
            written |= {number, number + 1} if pairs or ".WIDE" in name else {number}
        parts = parts[1:]
    for part in parts:
        for kind, digits, wide in _USE.findall(part):
            first, count = int(digits), 1
            if kind == "gdesc":  # of both operands, or where A is in registers of B alone
                only_b = name.startswith("HGMMA") and re.match(r"\s*R(\d+|Z)", parts[1])
                first, count = (first + 2, 2) if only_b else (first, 4)
            elif kind or wide or pairs or (name.startswith("UIMAD.WIDE") and part is parts[-1]):
                count = 2
            read |= set(range(first, first + count))
    return written, read


def _successors(code: list[_Instruction], labels: dict[str, int]) -> list[list[int]]:
    found: list[list[int]] = []
    for i, (guard, name, operands) in enumerate(code):
        conditional = guard not in ("", "@PT", "@UPT") or re.search(r"\bU?P\d+,", operands)
        after = [i + 1] if i + 1 < len(code) else []
        target = _TARGET.search(operands)
        if name.startswith("BRA") and target:
            to = [labels[target[1]]] if target[1] in labels else []
            after = to + (after if conditional else [])
        elif name.startswith(("EXIT", "RET")) and guard in ("", "@PT", "@UPT"):
            after = []
        found.append([s for s in after if s < len(code)])
    return found


def undefined(program: str) -> list[str]:
    """The instructions of one function that read what may not have been written."""
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in program.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif match := _LINE.match(line):
            code.append(_Instruction((match[1] or "").strip(), match[2], match[3]))
    if not code:
        return []
    registers = [_registers(instruction) for instruction in code]
    after = _successors(code, labels)
    before: list[set[int] | None] = [None] * len(code)  # written on every way here
    before[0] = set()
    work = [0]
    while work:
        i = work.pop()
        held = before[i]
        assert held is not None
        out = held | registers[i][0]
        for s in after[i]:
            old = before[s]
            new = out if old is None else old & out
            if new != old:
                before[s] = set(new)
                work.append(s)
    found = []
    for instruction, (_, read), held in zip(code, registers, before, strict=True):
        if held is not None and read - held:
            names = ", ".join(f"UR{r}" for r in sorted(read - held))
            found.append(f"{instruction.name} {instruction.operands} reads {names}")
    return found
