"""The argument checks that rope, rope_qk and rope_qk_ share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops.ops import _check


def check_heads(op: str, argument: str, x: Tensor) -> None:
    _check.floating(op, argument, x)
    if x.dim() != 4:
        raise ValueError(
            f"llmops.{op}: {argument} must be [B, H, T, D]; got shape {tuple(x.shape)}"
        )


def check_pair(op: str, q: Tensor, k: Tensor) -> None:
    check_heads(op, "q", q)
    check_heads(op, "k", k)
    qs, ks = q.shape, k.shape
    if qs[0] != ks[0] or qs[2] != ks[2] or qs[3] != ks[3]:
        raise ValueError(
            f"llmops.{op}: q [B, Hq, T, D] and k [B, Hk, T, D] must agree in B, T and D; got "
            f"{tuple(qs)} and {tuple(ks)}"
        )
    if q.dtype != k.dtype:
        raise TypeError(
            f"llmops.{op}: q has dtype {_check.dtype_name(q.dtype)} and k "
            f"{_check.dtype_name(k.dtype)}; convert one, e.g. k.to(q.dtype)"
        )
    if q.device != k.device:
        _check.same_device(op, "q", q, "k", k)


def check_tables(op: str, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Any) -> None:
    # The usual case first: these few microseconds are what a decode step pays per layer.
    if type(cos) is not Tensor or cos.dtype != torch.float32:
        _check.floating(op, "cos", cos)
    if type(sin) is not Tensor or sin.dtype != torch.float32:
        _check.floating(op, "sin", sin)
    shape, rank = cos.shape, cos.dim()
    if rank not in (2, 3) or sin.shape != shape:
        raise ValueError(
            f"llmops.{op}: cos and sin must both be [N, R/2] or both [B, T, R/2]; got "
            f"{tuple(shape)} and {tuple(sin.shape)}"
        )
    batch, _, tokens, head_dim = x.shape
    if 2 * shape[-1] > head_dim:
        raise ValueError(
            f"llmops.{op}: cos and sin have {shape[-1]} columns, which turn {2 * shape[-1]} "
            f"elements, but the head dim is {head_dim}; a table in which every angle stands twice "
            "is cut with cos[..., : cos.shape[-1] // 2]"
        )
    device = x.device
    if cos.device != device or sin.device != device:
        _check.same_device(op, "x" if op == "rope" else "q", x, "cos", cos)
        _check.same_device(op, "x" if op == "rope" else "q", x, "sin", sin)
    if rank == 3:
        if position_ids is not None:
            raise ValueError(
                f"llmops.{op}: position_ids goes with [N, R/2] tables; cos is already gathered, "
                f"with shape {tuple(shape)}; drop one"
            )
        if shape[0] not in (1, batch) or shape[1] != tokens:
            raise ValueError(
                f"llmops.{op}: gathered cos and sin must be [B, T, R/2] with B 1 or {batch} and T "
                f"{tokens}; got {tuple(shape)}"
            )
    elif position_ids is None:
        if shape[0] < tokens:
            raise ValueError(
                f"llmops.{op}: {tokens} tokens need as many rows of cos and sin, which have "
                f"{shape[0]}; make longer tables with llmops.rope_tables"
            )
    else:
        _check_positions(op, x, position_ids)


def _check_positions(op: str, x: Tensor, position_ids: Any) -> None:
    _check.integers(op, "position_ids", position_ids)
    shape = position_ids.shape
    batch, tokens = x.shape[0], x.shape[2]
    if (
        len(shape) not in (1, 2)
        or shape[-1] != tokens
        or (len(shape) == 2 and shape[0] not in (1, batch))
    ):
        raise ValueError(
            f"llmops.{op}: position_ids must be [T] or [B, T] with B {batch} and T {tokens}; got "
            f"{tuple(shape)}"
        )
    if position_ids.device != x.device:
        _check.same_device(op, "x" if op == "rope" else "q", x, "position_ids", position_ids)
