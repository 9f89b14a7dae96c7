"""ptx_emulator.py with shared memory watched: its threads go in step, a GPU's warps do not.

Between two barriers no warp may read or change what another has written, nor change what another
has read. What an asynchronous copy fills is nobody's until it is waited for, what a wgmma reads
may not change before it is waited for, and of what was written in the plain way it needs a fence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import ptx_emulator
import triton
from ptx_emulator import Value
from ptx_values import BASE, SHARED, UNSIGNED


class Watched(ptx_emulator.Block):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.barrier()
        self.warps = np.arange(self.threads) // 32
        self.copied = np.zeros(SHARED, np.int16)  # copies under way, by byte
        self.multiplied = np.zeros(SHARED, np.int16)  # wgmma's under way that read it
        self.unfenced = np.zeros(SHARED, bool)
        self.products: list[list[Value]] = [[]]  # what they read, by group; the last: uncommitted

    def barrier(self) -> None:
        self.writer = np.full(SHARED, -1, np.int8)  # a warp
        self.readers = np.zeros(SHARED, np.uint32)  # a bit for each warp

    def race(self, found: Value, what: str, text: str) -> None:
        if found.any():
            raise AssertionError(f"{text}: {what}, {int(found.sum())} bytes")

    def touch(self, at: Value, warps: Value, text: str, changes: Value | None = None) -> None:
        """Bytes [threads, size]; changes: of a write, those that get another value."""
        warp = np.broadcast_to(warps[:, None], at.shape).ravel()
        at, bit = at.ravel(), np.uint32(1) << warp.astype(np.uint32)
        foreign = (self.writer[at] >= 0) & (self.writer[at] != warp)
        self.race(self.copied[at] > 0, "a copy is under way", text)
        if changes is None:
            self.race(foreign, "another warp's, and no barrier between", text)
            np.bitwise_or.at(self.readers, at, bit)
            return
        self.race(foreign & changes.ravel(), "two warps write it", text)
        others = self.readers[at] & ~bit
        self.race((others != 0) & changes.ravel(), "another warp may still read it", text)
        self.race(self.multiplied[at] > 0, "a wgmma may still read it", text)
        self.writer[at], self.unfenced[at] = warp, True

    def move(self, kind: str, space: str, width: int, text: str) -> None:
        if space == "shared" and self.mask.any():
            address = self.access(space, text)[1][self.mask] - BASE
            size, warps = width // 8, self.warps[self.mask]
            for i, name in enumerate(self.moved(kind, text)):
                at = address[:, None] + np.arange(i * size, (i + 1) * size)
                changes = None
                if kind == "st":
                    data = self.get(name, width)[self.mask].astype(UNSIGNED[width])
                    changes = self.bytes[at] != data.view(np.uint8).reshape(-1, size)
                self.touch(at, warps, text, changes)
        super().move(kind, space, width, text)

    def copy_later(self, text: str) -> None:
        target, size = self.access("shared", text.split(",")[0])[1], int(text.split(",")[2], 0)
        at = (target[self.mask] - BASE)[:, None] + np.arange(size)
        warps, every = self.warps[self.mask], np.ones(at.shape, bool)
        self.touch(at, warps, text, every)
        np.add.at(self.copied, at.ravel(), 1)
        super().copy_later(text)

        def landed() -> None:
            np.add.at(self.copied, at.ravel(), -1)
            self.touch(at, warps, text, every)

        self.copies[-1].append(landed)

    def arriving(self, at: Value, warp: int, text: str) -> Callable[[], None]:
        self.race(self.unfenced[at], "written, and no fence.proxy.async since", text)
        self.touch(at[:, None], np.full(at.size, warp), text, np.ones((at.size, 1), bool))
        self.copied[at] += 1

        def landed() -> None:  # for every warp that has waited; all wait
            self.copied[at] -= 1
            self.writer[at], self.unfenced[at] = -1, False

        return landed

    def matrices(self, op: str, text: str) -> None:
        count = int(re.search(r"\.x(\d)", op)[1])  # type: ignore[index]
        rows = self.access("shared", text)[1].reshape(-1, 32)[:, : 8 * count] - BASE
        at = rows.reshape(-1, 1) + np.arange(16)
        writes = None if op.startswith("ld") else np.ones(at.shape, bool)
        self.touch(at, np.repeat(np.arange(len(rows)), 8 * count), text, writes)
        super().matrices(op, text)

    def multiply(self, at: Value) -> None:
        at = np.unique(np.concatenate([at.ravel(), at.ravel() + 1]))
        self.race(self.writer[at] >= 0, "written, and no barrier since", "wgmma")
        self.race(self.copied[at] > 0, "a copy is under way", "wgmma")
        self.race(self.unfenced[at], "written, and no fence.proxy.async since", "wgmma")
        self.multiplied[at] += 1
        self.products[-1].append(at)

    def step(self, text: str, active: Value) -> str | None:
        if re.match(r"bar\.sync\s+0\b", text):  # the one of all warps
            self.barrier()
        elif "fence.proxy.async" in text:
            self.unfenced[:] = False
        elif "wgmma.commit_group" in text:
            self.products.append([])
        elif "wgmma.wait_group" in text:
            done = max(len(self.products) - 1 - int(text.split()[-1]), 0)
            for at in (at for group in self.products[:done] for at in group):
                self.multiplied[at] -= 1
                self.readers[at] = np.uint32(0xFFFFFFFF)
            del self.products[:done]
        return super().step(text, active)


# Triton 3.6 has no fence between its copies to shared memory and the wgmma that reads them.
BLOCK = ptx_emulator.Block if triton.__version__.startswith("3.6.") else Watched
