"""Rotary position embedding of one tensor, or of q and k in one launch, in place or not.

    a' = a cos - b sin,  b' = b cos + a sin;  (a, b) = (x[i], x[i + R/2]), or (x[2i], x[2i + 1])

A program turns the same pairs of a few tokens and of a group of heads of q or of k, so that one
load of cos and sin serves the group. Neighbouring pairs come as [.., 2] and are split in registers.
Elements past R are copied (in place: not touched). fp32 inside, rounded once; 2 accesses per
element. Each element is read and written by one program, so in place needs no order. A position
outside the tables, which a GPU cannot report, turns into NaN and reads nothing.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import all_registers, cdiv, launch
from torch import Tensor


@triton.jit
def _turn(
    x, y, b, token, head, c_row, s_row, valid, tokens, heads, half, dim, cos_d, sin_d,
    x_b, x_h, x_t, x_d, y_b, y_h, y_t, y_d,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens [TOKENS, 1, 1] and heads [1, GROUP, 1] of batch element b; c_row and s_row point to
    the tokens' rows of cos and sin."""
    from_row = x + b * x_b + token * x_t + head * x_h
    to_row = y + b * y_b + token * y_t + head * y_h
    there = (token < tokens) & (head < heads)
    first = tl.arange(0, BLOCK)[None, None, :]
    for begin in range(0, half, BLOCK):
        pair = (begin + first).to(tl.int64)
        known = valid & (pair < half)
        c = tl.load(c_row + pair * cos_d, mask=known, other=float("nan")).to(tl.float32)
        s = tl.load(s_row + pair * sin_d, mask=known, other=float("nan")).to(tl.float32)
        if INVERSE:
            s = -s
        inside = there & (pair < half)
        if INTERLEAVED:
            place = 2 * pair[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
            both = inside[:, :, :, None] & (place < 2 * half)
            ab = tl.load(from_row[:, :, :, None] + place * x_d, mask=both, other=0.0)
            a, other = tl.split(ab.to(tl.float32))
            turned = tl.join(a * c - other * s, other * c + a * s).to(y.dtype.element_ty)
            tl.store(to_row[:, :, :, None] + place * y_d, turned, mask=both)
        else:
            a = tl.load(from_row + pair * x_d, mask=inside, other=0.0).to(tl.float32)
            other = tl.load(from_row + (pair + half) * x_d, mask=inside, other=0.0).to(tl.float32)
            kind = y.dtype.element_ty
            tl.store(to_row + pair * y_d, (a * c - other * s).to(kind), mask=inside)
            tl.store(to_row + (pair + half) * y_d, (other * c + a * s).to(kind), mask=inside)
    if not IN_PLACE:
        for begin in range(2 * half, dim, BLOCK):
            column = (begin + first).to(tl.int64)
            inside = there & (column < dim)
            rest = tl.load(from_row + column * x_d, mask=inside, other=0.0)
            tl.store(to_row + column * y_d, rest, mask=inside)


@triton.jit
def rope_kernel(
    q, k, q_out, k_out, cos, sin, ids, tokens, q_heads, k_heads, half, dim, rows,
    q_b, q_h, q_t, q_d, k_b, k_h, k_t, k_d, qo_b, qo_h, qo_t, qo_d, ko_b, ko_h, ko_t, ko_d,
    cos_b, cos_t, cos_d, sin_b, sin_t, sin_d, ids_b, ids_t,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, IN_PLACE: tl.constexpr,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """k is None: q alone. ids is None: token t is at row t of cos and sin."""
    q_groups = tl.cdiv(q_heads, GROUP)
    groups = q_groups
    if k is not None:
        groups += tl.cdiv(k_heads, GROUP)
    blocks = tl.cdiv(tokens, TOKENS)
    program = tl.program_id(0).to(tl.int64)
    group = program % groups
    b = program // groups // blocks
    token = (program // groups % blocks * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    valid = token < tokens
    at = token
    if ids is not None:
        at = tl.load(ids + b * ids_b + token * ids_t, mask=valid, other=0).to(tl.int64)
        valid = valid & (at >= 0) & (at < rows)
    c_row = cos + b * cos_b + at * cos_t
    s_row = sin + b * sin_b + at * sin_t
    within = tl.arange(0, GROUP)[None, :, None]
    if group < q_groups:
        _turn(q, q_out, b, token, group * GROUP + within, c_row, s_row, valid, tokens, q_heads,
              half, dim, cos_d, sin_d, q_b, q_h, q_t, q_d, qo_b, qo_h, qo_t, qo_d,
              INTERLEAVED, INVERSE, IN_PLACE, BLOCK)  # fmt: skip
    elif k is not None:
        _turn(k, k_out, b, token, (group - q_groups) * GROUP + within, c_row, s_row, valid, tokens,
              k_heads, half, dim, cos_d, sin_d, k_b, k_h, k_t, k_d, ko_b, ko_h, ko_t, ko_d,
              INTERLEAVED, INVERSE, IN_PLACE, BLOCK)  # fmt: skip


# ---- launchers -----------------------------------------------------------------------------------

# Pairs of a program; a longer head is looped over in blocks of so many.
PAIRS = 1024
# Heads that share one load of cos and sin: their tables are then a tenth of a program's traffic.
GROUP = 8


def _table(half: int, heads: int, tokens: int) -> _config.Config:
    """Not measured yet; from ahead-of-time inspection."""
    block = _rows.block(half, PAIRS)
    group = min(_rows.power_of_2(heads), GROUP, PAIRS // block)
    held = 1 if tokens == 1 else PAIRS // block // group
    return {"TOKENS": held, "GROUP": group, "BLOCK": block, "num_warps": 4}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    for half in _rows.lengths(PAIRS):
        for heads in (1, 2, 4, 8):
            for tokens in (1, 2):
                yield (half, dtype), _table(half, heads, tokens)


def candidates(op: str, key: tuple[int, torch.dtype]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table."""
    block = min(key[0], PAIRS)
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        for group in (1, 2, 4, 8):
            for warps in (2, 4, 8):
                if 64 * warps <= tokens * group * block <= 512 * warps:
                    yield {"TOKENS": tokens, "GROUP": group, "BLOCK": block, "num_warps": warps}


def _run(
    q: Tensor, k: Tensor | None, q_out: Tensor, k_out: Tensor | None, cos: Tensor, sin: Tensor,
    position_ids: Tensor | None, interleaved: bool, inverse: bool,
) -> None:  # fmt: skip
    batch, q_heads, tokens, dim = q.shape
    k_heads = 0 if k is None else k.shape[1]
    half = cos.shape[-1]
    if batch * tokens * dim * (q_heads + k_heads) == 0:
        return
    ids_strides = (0, 0)
    if position_ids is not None:
        per_batch = position_ids.dim() == 2 and position_ids.shape[0] > 1
        ids_strides = (position_ids.stride(0) if per_batch else 0, position_ids.stride(-1))
    table_strides: list[int] = []
    for table in (cos, sin):
        per_batch = table.dim() == 3 and table.shape[0] > 1
        strides = (table.stride(0) if per_batch else 0, table.stride(-2), table.stride(-1))
        table_strides += strides
    nothing = (0, 0, 0, 0)
    config = _config.choose(
        "rope", (_rows.power_of_2(half), q.dtype), _table(half, max(q_heads, k_heads), tokens)
    )
    # Told none of them, ptxas spills two words of neighbouring pairs, and of short heads.
    short = config["BLOCK"] <= 32
    bound = all_registers(config["num_warps"]) if interleaved or short else {}
    groups = cdiv(q_heads, config["GROUP"]) + cdiv(k_heads, config["GROUP"])
    grid = (batch * cdiv(tokens, config["TOKENS"]) * groups,)
    arguments = (q, k, q_out, k_out, cos, sin, position_ids, tokens, q_heads, k_heads, half, dim)
    launch(
        rope_kernel, grid, *arguments, cos.shape[-2],
        *q.stride(), *(nothing if k is None else k.stride()),
        *q_out.stride(), *(nothing if k_out is None else k_out.stride()),
        *table_strides, *ids_strides,
        INTERLEAVED=interleaved, INVERSE=inverse, IN_PLACE=q_out is q, **config, **bound,
    )  # fmt: skip


def _output_like(x: Tensor, token_major: bool) -> Tensor:
    b, h, t, d = x.shape
    if token_major:
        return torch.empty((b, t, h, d), dtype=x.dtype, device=x.device).transpose(1, 2)
    return torch.empty((b, h, t, d), dtype=x.dtype, device=x.device)


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None,
    interleaved: bool = False, inverse: bool = False, token_major: bool = False,
) -> Tensor:  # fmt: skip
    """x [B, H, T, D] turned; in memory as such or, token_major, as [B, T, H, D]."""
    y = _output_like(x, token_major)
    _run(x, None, y, None, cos, sin, position_ids, interleaved, inverse)
    return y


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None,
    interleaved: bool = False, inverse: bool = False, token_major: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, Hq, T, D] and k [B, Hk, T, D] turned, both in the one memory order."""
    q_out, k_out = _output_like(q, token_major), _output_like(k, token_major)
    _run(q, k, q_out, k_out, cos, sin, position_ids, interleaved, inverse)
    return q_out, k_out


def rope_qk_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None,
    interleaved: bool = False, inverse: bool = False,
) -> None:  # fmt: skip
    """q and k turned in place; refused where an element would be turned twice."""
    if q.numel() > 0 and k.numel() > 0:
        _refuse_shared(q, k)
    _run(q, k, q, k, cos, sin, position_ids, interleaved, inverse)


def _refuse_shared(q: Tensor, k: Tensor) -> None:
    runs = []
    for name, x in (("q", q), ("k", k)):
        runs.append(_runs(x))
        if any(runs[-1][i][0] < _span(runs[-1], i + 1) for i in range(len(runs[-1]))):
            raise RuntimeError(
                f"llmops.rope_qk_: {name}'s elements share memory (expanded or overlapping "
                "strides); use llmops.rope_qk, which writes new tensors"
            )
    if q.is_meta:  # it has no addresses
        return
    offset = (k.data_ptr() - q.data_ptr()) // q.element_size()
    first, second = runs if offset >= 0 else runs[::-1]
    if not _disjoint(first, second, abs(offset)):
        raise RuntimeError(
            "llmops.rope_qk_: q and k share memory; use llmops.rope_qk, which writes new tensors"
        )


def _runs(x: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions longer than 1, largest stride first."""
    found = zip(x.stride(), x.shape, strict=True)
    return sorted((run for run in found if run[1] > 1), reverse=True)


def _span(runs: list[tuple[int, int]], begin: int) -> int:
    """Elements from the first to one past the last, over the runs from `begin` on."""
    return 1 + sum((size - 1) * stride for stride, size in runs[begin:])


def _disjoint(q: list[tuple[int, int]], k: list[tuple[int, int]], offset: int) -> bool:
    """True when k, `offset` elements behind q, provably shares none: their outer strides agree, and
    within one such stride the two lie side by side (a fused projection's layout)."""
    for i in range(len(q) + 1):
        if offset >= _span(q, i):
            return True
        if i >= len(q) or i >= len(k) or q[i][0] != k[i][0]:
            return False
        offset %= q[i][0]
        if offset + _span(k, i + 1) > q[i][0]:  # k would reach into q's next run
            return False
    return False
