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


def scale(op: str, x: Any) -> None:
    """A number of any kind, a Tensor of one too; a bool would be taken for 0 or 1."""
    number = isinstance(x, (int, float, torch.SymInt, torch.SymFloat)) or hasattr(x, "__float__")
    if isinstance(x, bool) or not number:
        raise TypeError(
            f"llmops.{op}: scale must be a number, or None for 1/sqrt(D); got {type(x).__name__} "
            f"{x!r}; pass what multiplies the scores, e.g. scale=0.125"
        )


def same_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if other.device != x.device:
        raise ValueError(
            f"llmops.{op}: {other_name} is on {other.device} and {name} on {x.device}; "
            f"move one, e.g. {other_name}.to({name}.device)"
        )


def integers(op: str, argument: str, ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = f"dtype {dtype_name(ids.dtype)}" if isinstance(ids, Tensor) else repr(ids)
        raise TypeError(
            f"llmops.{op}: {argument} must be an int64 or int32 Tensor; got {got}; convert it, "
            f"e.g. {argument}.long()"
        )


def within(op: str, argument: str, ids: Tensor, rows: int, what: str, remedy: str = "") -> None:
    """IndexError where an id is outside [0, rows): for the reference, whose indexing would count a
    negative one from the end. The kernels check by themselves."""
    if ids.numel() == 0 or ids.is_meta:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        valid = f" (0 to {rows - 1})" if rows else ""
        raise IndexError(
            f"llmops.{op}: {argument} holds {low if low < 0 else high}, but {what} {rows} rows"
            f"{valid}{remedy}"
        )
