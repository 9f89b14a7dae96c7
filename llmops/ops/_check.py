"""Checks that every front door shares. Errors name op, argument, expectation, value and remedy."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def fail_type(op: str, argument: str, expected: str, got: Any) -> NoReturn:
    shown = f"{type(got).__name__} {got!r}" if not isinstance(got, Tensor) else "a Tensor"
    raise TypeError(f"llmops.{op}: {argument} must be {expected}; got {shown}")


def floating(op: str, argument: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        fail_type(op, argument, "a Tensor", x)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"llmops.{op}: {argument} has dtype {dtype_name(x.dtype)}, expected float32, bfloat16, "
            f"float16 or float64; convert it, e.g. {argument}.float()"
        )


def same_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if other.device != x.device:
        raise ValueError(
            f"llmops.{op}: {other_name} is on {other.device} and {name} on {x.device}; "
            f"move one, e.g. {other_name}.to({name}.device)"
        )
