"""Calls of sample that reach every branch of its kernel. It draws, so it has no OpSpec: its tests
compare the drawn token with the exact distribution's interval for the same uniform number."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

TEMPERATURES = (1.0, 0.3)
TOP_K = (0, 1, 5, 300)
TOP_P = (1.0, 0.9, 0.1, 1e-9, 0.999999)
MIN_P = (0.0, 0.05)
SIZES = (1, 2, 7, 16, 17, 100, 1000, 32003)


def settings() -> Iterator[dict[str, Any]]:
    for temperature, top_k, top_p, min_p in product(TEMPERATURES, TOP_K, TOP_P, MIN_P):
        yield {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
