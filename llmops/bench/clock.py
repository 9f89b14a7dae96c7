"""Seconds of a call, on CPU and CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def timed(call: Callable[[], Any], number: int) -> float:
    """Mean seconds of `number` calls, whatever they queued on a GPU included."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(number):
        call()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / number
