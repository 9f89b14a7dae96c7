"""TMA in ptx_emulator.py: tensor maps, copies of their tiles to shared memory, and the mbarriers
that say when these have landed. A copy lands when the first wait for it succeeds, no sooner; a wait
that nothing will end ends the run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ptx_values import BASE, Value, signed


class TensorMap:
    """A tensor descriptor as the driver encodes it; `known` is what the compiled kernel says."""

    def __init__(self, tiles: Any, known: dict[str, Any]) -> None:
        self.tensor, self.shape, self.strides = tiles.base, tiles.shape, tiles.strides
        self.box, self.swizzle = known["block_size"], known["swizzle"]
        self.address = 0  # of the tensor in the emulator

    def tile(self, memory: Any, at: list[int], text: str) -> Value:
        """The box at these coordinates, the innermost last, as bytes; zeros beyond the tensor."""
        size, place, inside = self.tensor.element_size(), np.int64(0), np.True_
        for i, (n, first) in enumerate(zip(self.box, at, strict=True)):
            index = (first + np.arange(n)).reshape([-1 if i == j else 1 for j in range(len(at))])
            place = place + index * self.strides[i]
            inside = inside & (index >= 0) & (index < self.shape[i])
        found = np.zeros((place.size, size), np.uint8)
        if inside.any():
            address = self.address + place[inside] * size
            found[inside.ravel()] = memory.load(address, size, text)
        return found.reshape(-1)

    def swizzled(self, address: Value) -> Value:
        """Which 16 bytes of a row are where: exclusive or with the row's number."""
        return address ^ ((address >> 7) & ((1 << self.swizzle) - 1)) << 4


@dataclass
class Barrier:
    count: int  # arrivals that end a phase, once all bytes are there
    arrived: int = 0
    awaited: int = 0  # bytes
    phase: int = 0
    copies: list[Callable[[], None]] = field(default_factory=list)

    def advance(self) -> None:
        if self.arrived == self.count and self.awaited == 0:
            self.arrived, self.phase = 0, self.phase + 1


def step(block: Any, full: str, rest: str) -> None:
    """elect.sync, mbarrier.* and cp.async.bulk.tensor.*, of the threads in block.mask."""
    if full.startswith("elect"):
        _, predicate = rest.split(",")[0].split("|")
        block.set(predicate, np.arange(block.threads) % 32 == 0)
        return
    active = np.flatnonzero(block.mask)
    for thread in active[:1] if "try_wait" in full else active:  # all wait for the same
        _of_thread(block, full, rest, int(thread))


def _of_thread(block: Any, full: str, rest: str, thread: int) -> None:
    barriers: dict[int, Barrier] = block.barriers

    def value(name: str, width: int = 32) -> int:
        return int(signed(block.get(name.strip(), width))[thread])

    inside = re.findall(r"\[([^\]]*)\]", rest)
    at, argument = value(inside[-1]), rest.rsplit(",", 1)[-1]
    if ".init" in full:
        barriers[at] = Barrier(value(argument))
    elif ".inval" in full:
        if barriers.pop(at).copies:
            raise AssertionError(f"{full} {rest}: a copy is under way")
    elif "arrive.expect_tx" in full:
        barriers[at].arrived += 1
        barriers[at].awaited += value(argument)
        barriers[at].advance()
    elif "try_wait" in full:  # of a phase with this parity: the present one is not over
        if barriers[at].phase % 2 == value(argument):
            raise AssertionError(f"{full} {rest}: waits for what never comes")
        for copy in barriers[at].copies:
            copy()
        barriers[at].copies.clear()
    elif full.startswith("cp.async.bulk.tensor"):
        name, coordinates = inside[1].split(",", 1)
        tiles = block.arguments[value(name, 64)]
        place = [value(c) for c in coordinates.strip(" {}").split(",")][::-1]
        data = tiles.tile(block.memory, place, rest)
        target = tiles.swizzled(value(inside[0]) + np.arange(data.size))
        landed = block.arriving(target - BASE, thread // 32, rest)

        def copy() -> None:
            block.bytes[target - BASE] = data
            landed()

        barriers[at].copies.append(copy)
        barriers[at].awaited -= data.size
        barriers[at].advance()
    else:
        raise KeyError(full)
