"""Samples of rope and rope_qk that reach every branch of their kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import llmops
from llmops import reference
from llmops.testing._core import Make, OpSpec, Sample


def tables(make: Make, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles."""
    angles = make(*shape, scale=3, grad=False, dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def samples(make: Make) -> Iterator[Sample]:
    yield Sample("2x3x5x64", (make(2, 3, 5, 64), *tables(make, 9, 32)))
    ids = make.ints(2, 5, high=9)
    yield Sample("ids-2x2x5x34", (make(2, 2, 5, 34), *tables(make, 9, 17), ids))
    pairs = {"interleaved": True}
    yield Sample("pairs-1x2x3x70", (make(1, 2, 3, 70), *tables(make, 3, 35)), pairs)
    yield Sample("inverse-1x2x3x64", (make(1, 2, 3, 64), *tables(make, 3, 32)), {"inverse": True})
    yield Sample(
        "pairs-inverse-1x2x3x40",
        (make(1, 2, 3, 40), *tables(make, 3, 20)),
        {"interleaved": True, "inverse": True},
    )
    yield Sample(
        "decode-2x4x1x128", (make(2, 4, 1, 128), *tables(make, 9, 64), make.ints(2, 1, high=9))
    )
    yield Sample("partial-1x2x7x80", (make(1, 2, 7, 80), *tables(make, 7, 16)))
    yield Sample("partial-pairs-1x2x7x33", (make(1, 2, 7, 33), *tables(make, 7, 9)), pairs)
    yield Sample("none-1x1x2x5", (make(1, 1, 2, 5), *tables(make, 2, 0)))
    yield Sample("gathered-2x2x4x18", (make(2, 2, 4, 18), *tables(make, 2, 4, 9)))
    yield Sample("gathered-one-2x2x4x18", (make(2, 2, 4, 18), *tables(make, 1, 4, 9)))
    ids32 = make.ints(6, high=11, dtype=torch.int32)
    yield Sample("ids32-3x2x6x12", (make(3, 2, 6, 12), *tables(make, 11, 6), ids32))
    double = tables(make, 4, 8, dtype=torch.float64)
    yield Sample("tables64-1x2x4x16", (make(1, 2, 4, 16), *double))
    yield Sample("tokenmajor-2x3x5x48", (token_major(make, 2, 3, 5, 48), *tables(make, 5, 24)))
    # Long enough to be cut into tasks and to run on more than one thread.
    yield Sample("long-1x2x1030x32", (make(1, 2, 1030, 32), *tables(make, 1030, 16)))
    for shape in ((0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)):
        yield Sample(f"empty-{'x'.join(map(str, shape))}", (make(*shape), *tables(make, 3, 4)))


def token_major(make: Make, b: int, h: int, t: int, d: int) -> Tensor:
    return make(b, t, h, d, grad=False).transpose(1, 2).requires_grad_()


def samples_qk(make: Make) -> Iterator[Sample]:
    q, k = make(2, 4, 5, 64), make(2, 2, 5, 64)
    yield Sample("2x4+2x5x64", (q, k, *tables(make, 9, 32)))
    pairs = {"interleaved": True}
    yield Sample(
        "pairs-1x3+1x4x22", (make(1, 3, 4, 22), make(1, 1, 4, 22), *tables(make, 4, 11)), pairs
    )
    ids = make.ints(3, 1, high=20)
    yield Sample(
        "decode-3x8+2x1x32", (make(3, 8, 1, 32), make(3, 2, 1, 32), *tables(make, 20, 16), ids)
    )
    fixed = make(1, 2, 3, 16, grad=False)
    yield Sample("k-fixed-1x2+2x3x16", (make(1, 2, 3, 16), fixed, *tables(make, 3, 8)))
    q, k = token_major(make, 2, 4, 3, 24), token_major(make, 2, 2, 3, 24)
    yield Sample("tokenmajor-2x4+2x3x24", (q, k, *tables(make, 3, 10)), {"inverse": True})
    yield Sample("empty-0x2+1x3x8", (make(0, 2, 3, 8), make(0, 1, 3, 8), *tables(make, 3, 4)))


def torch_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensor:
    """As models write it: rotate_half in x's dtype, with tables of twice the columns."""
    if cos.dim() == 2:
        ids = torch.arange(x.shape[2], device=x.device) if position_ids is None else position_ids
        cos, sin = cos[ids], sin[ids]
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    if inverse:
        sin = -sin
    rotated = 2 * cos.shape[-1]
    turn, rest = x[..., :rotated], x[..., rotated:]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        other = torch.stack((-turn[..., 1::2], turn[..., 0::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        a, b = turn.chunk(2, -1)
        other = torch.cat((-b, a), -1)
    return torch.cat((turn * cos + other * sin, rest), -1)


def torch_rope_qk(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return torch_rope(q, *args, **kwargs), torch_rope(k, *args, **kwargs)


def schemas(make: Make) -> dict[str, tuple[Any, ...]]:
    cos, sin = tables(make, 6, 4)
    ids = make.ints(2, 3, high=6)
    return {"rope": (make(2, 2, 3, 10), cos, sin, ids, True, False, True, "cpu")}


def schemas_qk(make: Make) -> dict[str, tuple[Any, ...]]:
    cos, sin = tables(make, 6, 4)
    q, k = make(2, 4, 3, 8), make(2, 2, 3, 8)
    return {
        "rope_qk": (q, k, cos, sin, None, False, False, False, "cpu"),
        "rope_qk_": (q.detach(), k.detach(), cos, sin, None, False, True, "cpu"),
    }


SPEC = OpSpec(
    name="rope",
    fn=llmops.rope,
    reference=reference.rope,
    torch_fn=torch_rope,
    samples=samples,
    schemas=schemas,
    rows=True,
)
SPEC_QK = OpSpec(
    name="rope_qk",
    fn=llmops.rope_qk,
    reference=reference.rope_qk,
    torch_fn=torch_rope_qk,
    samples=samples_qk,
    schemas=schemas_qk,
    rows=True,
)
