"""What the plain norms share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmops.reference._common import _wide


def _dims(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    return tuple(range(-len(shape), 0))


def _add(x: Tensor, residual: Tensor) -> Tensor:
    return (_wide(x) + _wide(residual)).to(torch.promote_types(x.dtype, residual.dtype))


def _norm_bwd(
    dy: Tensor,
    h: Tensor,
    dh: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dims: int,
    weight_offset: float,
    centered: bool,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of h = x + residual (dh, that of the output h, added), the same in dy's dtype,
    and the parameters'; what is not needed has no elements."""
    over, rows = tuple(range(-dims, 0)), tuple(range(h.dim() - dims))
    wide, g = _wide(h), _wide(dy).to(_wide(h).dtype)
    if centered:
        wide = wide - wide.mean(over, keepdim=True)
    rstd = torch.rsqrt(wide.square().mean(over, keepdim=True) + eps)
    z = wide * rstd
    shape = h.shape[h.dim() - dims :]

    def of_parameter(product: Tensor, parameter: Tensor | None) -> Tensor:
        dtype = torch.float32 if parameter is None else parameter.dtype
        if not need[2]:
            return product.new_empty(0, dtype=dtype)
        # (A sum over no dimensions at all would be one over every dimension.)
        return (product.sum(rows) if rows else product).reshape(shape).to(dtype)

    dweight, dbias = of_parameter(g * z, weight), of_parameter(g, bias)
    if weight is not None:
        g = g * (weight.to(g.dtype) + weight_offset)
    total = g - z * (g * z).mean(over, keepdim=True)
    if centered:
        total = total - g.mean(over, keepdim=True)
    total = total * rstd
    if dh is not None:
        total = total + _wide(dh)
    return (
        total.to(h.dtype) if need[0] else h.new_empty(0),
        total.to(dy.dtype) if need[1] else dy.new_empty(0),
        dweight,
        dbias,
    )
