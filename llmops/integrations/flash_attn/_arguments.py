"""What flash-attn's arguments mean to llmops.attention, and the checks of their forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llmops.ops import _check

Window = Sequence[int]


def modifiers(
    op: str,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> dict[str, Any]:
    """The keyword arguments of llmops.attention."""
    if softcap < 0.0:
        raise ValueError(f"llmops.{op}: softcap must be positive, or 0.0 for none; got {softcap}")
    return {
        "causal": causal,
        "scale": softmax_scale,
        "window": window(op, window_size),
        "softcap": softcap or None,
        "alibi_slopes": alibi_slopes,
    }


def window(op: str, window_size: Window) -> tuple[int, int] | None:
    if len(window_size) != 2:
        raise ValueError(f"llmops.{op}: window_size must be (left, right); got {window_size!r}")
    left, right = (max(int(side), -1) for side in window_size)
    return None if left < 0 and right < 0 else (left, right)


def heads(op: str, layout: str, **tensors: Tensor) -> None:
    """Each tensor is floating point and has the dimensions of `layout`."""
    dims = layout.count(",") + 1
    for name, x in tensors.items():
        _check.floating(op, name, x)
        if x.dim() != dims:
            raise ValueError(f"llmops.{op}: {name} must be {layout}; got shape {tuple(x.shape)}")


def packed(op: str, name: str, x: Tensor, layout: str, parts: int) -> None:
    """`x` is one tensor of `parts` projections, stacked before its heads."""
    heads(op, layout, **{name: x})
    if x.shape[-3] != parts:
        raise ValueError(
            f"llmops.{op}: {name} must be {layout}; got {x.shape[-3]} in place of the {parts} in "
            f"shape {tuple(x.shape)}"
        )


def same_keys(op: str, q: Tensor, k: Tensor, v: Tensor, names: str = "q k v") -> None:
    """k and v fit each other and q: [..., T, H, D] each."""
    q_name, k_name, v_name = names.split()
    for name, x in ((k_name, k), (v_name, v)):
        if x.dtype != q.dtype:
            raise TypeError(
                f"llmops.{op}: {name} has dtype {_check.dtype_name(x.dtype)} and {q_name} "
                f"{_check.dtype_name(q.dtype)}; convert one, e.g. {name}.to({q_name}.dtype)"
            )
        _check.same_device(op, q_name, q, name, x)
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"llmops.{op}: {k_name} and {v_name} must agree in all but the head dim; got "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[-1] != q.shape[-1] or q.shape[-2] % max(k.shape[-2], 1):
        raise ValueError(
            f"llmops.{op}: {k_name} must have {q_name}'s head dim {q.shape[-1]} and a number of "
            f"heads that divides its {q.shape[-2]}; got shape {tuple(k.shape)}"
        )
