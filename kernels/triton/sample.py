"""From logits to token ids: temperature, top-k, top-p, min-p, then the inverse of the cumulative
distribution in token order, at a given uniform number.

    w_j = exp((x_j - max x) / temperature),  token: the first whose cumulative w exceeds u sum w
    over the tokens that a filter kept; a filter keeps the tokens at or above a threshold

No sort. A threshold is the largest fp32 number whose tokens are still k many (top-k), or weigh
top_p of all (top-p): found by its bits, in the order-preserving map of fp32 to integers, two of
them per sweep over the row, which the L2 cache holds. A program has one row, or several short ones;
lanes run along it. 16-bit logits have 16 bits (bf16) or 19 (fp16) to be found, weights 30.

Weights in fp32, recomputed in each sweep by the same instructions; their sums in fp32 along a lane
and fp64 across. A fixed order: the same row and number give the same token. A row without a
distribution, which a GPU cannot report, has token -1.

Fan, Lewis and Dauphin, 2018 (top-k); Holtzman et al., 2020 (top-p); Nguyen et al., 2024 (min-p).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._launch import all_registers, architecture, cdiv, launch
from torch import Tensor


@triton.jit
def _to_key(x, SHIFT: tl.constexpr):
    """Integers in the order of the floats; SHIFT: the low bits that they all have alike."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _from_key(key, SHIFT: tl.constexpr):
    bits = key << SHIFT
    bits = tl.where(bits < 0, bits | ((1 << SHIFT) - 1), bits)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _logits(x, column, n, valid):
    """fp32 [ROWS, BLOCK], -inf outside; x: pointers to the rows [ROWS, 1]."""
    return tl.load(x + column, mask=valid & (column < n), other=-float("inf")).to(tl.float32)


@triton.jit
def _weights(z, top, temperature, cut):
    """0 where top-k dropped the token. A division: 1 / temperature may overflow."""
    return tl.where(z >= cut, tl.exp((z - top) / temperature), 0.0)


@triton.jit
def _sums_from(
    x, n, valid, top, temperature, cut, a, b, c, MASS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the tokens that reach a, b and c [ROWS, 1]: their weight, or how many there are."""
    kind: tl.constexpr = tl.float32 if MASS else tl.int32
    sum_a = tl.zeros([ROWS, BLOCK], kind)
    sum_b = tl.zeros([ROWS, BLOCK], kind)
    sum_c = tl.zeros([ROWS, BLOCK], kind)
    for begin in range(0, n, BLOCK):
        column = begin + tl.arange(0, BLOCK)[None, :]
        value = _logits(x, column, n, valid)
        if MASS:
            value = _weights(value, top, temperature, cut)
            sum_a += tl.where(value >= a, value, 0.0)
            sum_b += tl.where(value >= b, value, 0.0)
            sum_c += tl.where(value >= c, value, 0.0)
        else:  # outside is -inf, as an excluded token, and no threshold is that low
            sum_a += (value >= a).to(tl.int32)
            sum_b += (value >= b).to(tl.int32)
            sum_c += (value >= c).to(tl.int32)
    if MASS:
        return (
            tl.sum(sum_a.to(tl.float64), 1)[:, None],
            tl.sum(sum_b.to(tl.float64), 1)[:, None],
            tl.sum(sum_c.to(tl.float64), 1)[:, None],
        )
    else:
        return tl.sum(sum_a, 1)[:, None], tl.sum(sum_b, 1)[:, None], tl.sum(sum_c, 1)[:, None]


@triton.jit
def _threshold(
    x, n, valid, top, temperature, cut, low, high, target, SHIFT: tl.constexpr, MASS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest number between the keys low and high [ROWS, 1] whose tokens reach the target,
    which those of low do: a quarter of the range is left after each sweep."""
    while tl.max(tl.max((high > low).to(tl.int32), 1), 0) > 0:
        # Unsigned: from -inf to a large logit it is more than 31 bits.
        span = high.to(tl.uint32, bitcast=True) - low.to(tl.uint32, bitcast=True)
        step = ((span + 3) >> 2).to(tl.int32, bitcast=True)
        a = low + step
        b = tl.minimum(a + step, high)
        c = tl.minimum(b + step, high)
        of_a, of_b, of_c = _sums_from(
            x, n, valid, top, temperature, cut, _from_key(a, SHIFT), _from_key(b, SHIFT),
            _from_key(c, SHIFT), MASS, ROWS, BLOCK,
        )  # fmt: skip
        above_a = tl.where(of_b < target, b - 1, tl.where(of_c < target, c - 1, high))
        # A row that is done has a = b = c = low, which reaches the target.
        searched = high > low
        high = tl.where(searched, tl.where(of_a < target, a - 1, above_a), high)
        from_a = tl.where(of_b < target, a, tl.where(of_c < target, b, c))
        low = tl.where(searched, tl.where(of_a < target, low, from_a), low)
    return _from_key(low, SHIFT)


@triton.jit
def _top(x, n, valid, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows' maximum, its first place, and whether they hold NaN, [ROWS, 1]."""
    top = tl.full([ROWS, BLOCK], -float("inf"), tl.float32)
    place = tl.zeros([ROWS, BLOCK], tl.int32)
    bad = tl.zeros([ROWS, BLOCK], tl.int32)
    for begin in range(0, n, BLOCK):
        column = begin + tl.arange(0, BLOCK)[None, :]
        z = _logits(x, column, n, valid)
        bad = bad | (z != z).to(tl.int32)
        place = tl.where(z > top, column, place)
        top = tl.where(z > top, z, top)
    row_top = tl.max(top, 1)[:, None]
    first = tl.min(tl.where(top == row_top, place, n), 1)[:, None]
    return row_top, first, tl.max(bad, 1)[:, None] != 0


@triton.jit
def sample_greedy_kernel(x, token, rows, n, x_row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    valid = row < rows
    top, first, bad = _top(x + row * x_row, n, valid, ROWS, BLOCK)
    first = tl.where(bad | (top == -float("inf")), -1, first)
    tl.store(token + row, first.to(tl.int64), mask=valid)


@triton.jit
def sample_kernel(
    x, uniform, token, rows, n, x_row, temperature, top_k, top_p, min_p, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    valid = row < rows
    own = x + row * x_row
    top, _, bad = _top(own, n, valid, ROWS, BLOCK)
    usable = valid & (bad == 0) & (tl.abs(top) < float("inf"))
    top = tl.where(usable, top, 0.0)
    cut = tl.full([ROWS, 1], -float("inf"), tl.float32)
    if TOP_K:
        high = _to_key(top, SHIFT)
        low = tl.where(usable, _to_key(cut, SHIFT), high)
        cut = _threshold(own, n, usable, top, temperature, cut, low, high, top_k, SHIFT, False,
                         ROWS, BLOCK)  # fmt: skip
    least = tl.zeros([ROWS, 1], tl.float32) + min_p
    if TOP_P:
        zero = tl.zeros([ROWS, 1], tl.float32)
        total, _, _ = _sums_from(own, n, usable, top, temperature, cut, zero, zero, zero, True,
                                 ROWS, BLOCK)  # fmt: skip
        low = _to_key(zero, 0)
        high = tl.where(usable, _to_key(zero + 1.0, 0), low)
        nucleus = _threshold(own, n, usable, top, temperature, cut, low, high, total * top_p, 0,
                             True, ROWS, BLOCK)  # fmt: skip
        least = tl.maximum(least, nucleus)

    kept = tl.zeros([ROWS, 1], tl.float64)
    for begin in range(0, n, BLOCK):
        column = begin + tl.arange(0, BLOCK)[None, :]
        w = _weights(_logits(own, column, n, usable), top, temperature, cut)
        kept += tl.sum(tl.where(w >= least, w, 0.0), 1)[:, None].to(tl.float64)
    target = tl.load(uniform + row, mask=valid, other=0.0) * kept
    below = tl.zeros([ROWS, 1], tl.float64)
    found = tl.where(usable, n, -1)  # n: not yet
    last = tl.full([ROWS, 1], -1, tl.int32)
    begin = 0
    while (begin < n) & (tl.max(tl.max(found, 1), 0) == n):
        column = begin + tl.arange(0, BLOCK)[None, :]
        w = _weights(_logits(own, column, n, usable), top, temperature, cut)
        w = tl.where(w >= least, w, 0.0)
        through = below + tl.sum(w, 1)[:, None].to(tl.float64)
        last = tl.maximum(last, tl.max(tl.where(w > 0.0, column, -1), 1)[:, None])
        here = (found == n) & (through > target)
        if tl.max(tl.max(here.to(tl.int32), 1), 0) > 0:
            beyond = (w > 0.0) & (below + tl.cumsum(w, 1).to(tl.float64) > target)
            place = tl.min(tl.where(beyond, column, n), 1)[:, None]
            # The block's sum and its running sums differ in rounding: its last token then.
            found = tl.where(here, tl.minimum(place, last), found)
        below = through
        begin += BLOCK
    tl.store(token + row, tl.where(found == n, last, found).to(tl.int64), mask=valid)


# ---- launchers -----------------------------------------------------------------------------------

# The low bits of fp32 that no value of a type uses.
_SHIFT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
_LEAST_TEMPERATURE = 1e-37  # a positive one stays positive in fp32


def _table(n: int) -> _config.Config:
    """Not measured yet; from ahead-of-time inspection. Interpreted, a few large programs."""
    interpreted = architecture() == "interpreter"
    tile, most = (1 << 17, 4096) if interpreted else (2048, 2)
    block = _rows.block(n, tile)
    rows = min(tile // block, most)
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(rows * block // 512, 1)}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    for n in _rows.lengths(2048):
        yield (n, dtype), _table(n)


def candidates(op: str, key: tuple[int, torch.dtype]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table."""
    for block in sorted({min(key[0], size) for size in (1024, 2048, 4096, 8192)}):
        for config in _rows.tiles(block, most=1024):
            if config["ROWS"] <= 4:
                yield {**config, "BLOCK": block}


def sample(
    logits: Tensor, uniform: Tensor | None, temperature: float, top_k: int, top_p: float,
    min_p: float,
) -> Tensor:  # fmt: skip
    """logits [B, V], uniform fp64 [B], not read for temperature 0; the ids [B], int64."""
    source = _rows.as_rows(logits)
    rows, n = source.shape
    if n >= 2**31:
        raise NotImplementedError(
            f"llmops.sample: logits have {n} classes, fewer than 2**31 are supported on backend "
            "'triton'; use backend=\"reference\""
        )
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    config = _config.choose("sample", (_rows.power_of_2(n), logits.dtype), _table(n))
    grid = (cdiv(rows, config["ROWS"]),)
    arguments = (rows, n, source.stride(0))
    if uniform is None:
        launch(sample_greedy_kernel, grid, source, token, *arguments, **config)
        return token
    # Told none of them, ptxas spills a few words of two rows' state.
    bound = all_registers(config["num_warps"]) if config["ROWS"] > 1 else {}
    launch(
        sample_kernel, grid, source, uniform.contiguous(), token, *arguments,
        max(temperature, _LEAST_TEMPERATURE), top_k, top_p, min_p, TOP_K=0 < top_k < n,
        TOP_P=top_p < 1.0, SHIFT=_SHIFT[logits.dtype], **config, **bound,
    )  # fmt: skip
    return token
