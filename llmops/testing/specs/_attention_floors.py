"""What attention may be off by where the error rule's yardstick, PyTorch's own, is by luck not:
added to what the rule allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmops.testing._core import Sample, _cotangent, cast, leaves, outputs

# ex2.approx.ftz by the PTX ISA; our own on a CPU is within 1.6 ULP (csrc/cpu/simd_math.h).
_EX2 = 2.0**-22


def _wide(sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = {k: cast(v, torch.float64) for k, v in sample.kwargs.items()}
    return cast(sample.args, torch.float64), kwargs


def results(reference: Callable[..., Any]) -> Callable[[Sample], list[Tensor]]:
    """Of `out`, and of lse where it is asked for: the weights are exp2 of the scores, each off by
    what the instruction is, which weighs |v| in `out` and adds up to that of a logarithm in lse."""

    def floor(sample: Sample) -> list[Tensor]:
        (q, k, v, *others), kwargs = _wide(sample)
        with torch.no_grad():
            out, *lse = outputs(reference(q, k, v.abs(), *others, **kwargs))
        return [_EX2 * t.nan_to_num(0.0) for t in (out, *map(torch.ones_like, lse))]

    return floor


def of_delta(
    out: Tensor, lse: Tensor, cotangent: Tensor, wanted: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """What the rounding of `out`, and of P before it, does to gradients by delta = dout . out; out
    and lse in fp64, of inputs in `dtype`.

    dS = P (dout v^T - delta) is a difference, and a delta off by e moves it as an incoming gradient
    of lse of that size does. e of 16 bits: half an eps of each of out's Dv values, adding up in
    delta as the root of their squares. Of fp32: each of the 2 Dv additions in the two sums is off
    by up to half an eps of what it has summed, about that root; as an even distribution's three
    standard deviations 0.87 eps. Where many queries see a key it averages away; where one does, it
    stays: PyTorch's product and sum of a row that sees one key cancel to nothing, if by luck.
    """
    size = 0.5 if dtype.itemsize == 2 else 0.87 * (2 * out.shape[-1]) ** 0.5
    off = size * torch.finfo(dtype).eps * (cotangent * out.detach()).norm(dim=-1)
    if not wanted or not lse.requires_grad:  # no keys: no gradient
        return [torch.zeros_like(w) for w in wanted]
    grads = torch.autograd.grad(lse, wanted, off.reshape(lse.shape), allow_unused=True)
    return [torch.zeros_like(w) if g is None else g.nan_to_num(0.0).abs()
            for g, w in zip(grads, wanted, strict=True)]  # fmt: skip


def gradients(reference: Callable[..., Any]) -> Callable[[Sample], list[Tensor]]:
    """`of_delta` of each input that takes a gradient."""

    def floor(sample: Sample) -> list[Tensor]:
        args, kwargs = _wide(sample)
        out, lse = reference(*args, **{**kwargs, "return_lse": True})
        cotangent = _cotangent(out)
        if out.dim() == 3:  # of packed sequences: lse is [Hq, total_q]
            out, cotangent = out.transpose(0, 1), cotangent.transpose(0, 1)
        return of_delta(out, lse, cotangent, leaves(args, kwargs), sample.args[0].dtype)

    return floor
