"""Attention of new queries over a contiguous or paged key-value cache: split-KV flash decoding.

    out[t] = sum_j exp(s[t, j] - lse[t]) v[j],  lse[t] = log(exp(sink) + sum_j exp(s[t, j]))

s as in _attention_tile.py. A program takes the queries of one key head's group, BLOCK_M rows
(token, head of the group), over one part of the sequence's keys: K and V are read once for the
group, and even one query per head fills a tile of 16 rows. With more than one part each leaves its
own softmax and log-sum-exp in fp32, and a second kernel weighs the parts. The number of parts
depends on shapes alone; each sequence divides its own length by it, on the device. Bytes: the keys
and values held. `attention` of few queries over many keys comes here, too.

A GPU is not waited for, so nothing raises here: a sequence whose length or left pad the cache
cannot hold, and a query that sees a key of a block that is not there, give NaN, and nothing is read
for it.

Dao et al., "Flash-Decoding", 2023; Kwon et al., "PagedAttention", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from llmops.kernels.triton import _attention_tile as tile
from llmops.kernels.triton import _config, _launch, _rows
from llmops.kernels.triton._attention_problem import dense, heads_like, padded
from llmops.kernels.triton._launch import all_registers, cdiv, launch
from torch import Tensor

MOST_SPLITS = 64
SPLIT_KEYS = 256  # the fewest keys worth a part of their own
MOST_ROWS = 64  # of a tile: the queries of a group that share one read of its keys
WIDEST = 512  # head dimension


@triton.jit
def attention_kvcache_fwd_kernel(
    q, k, v, lengths, leftpad, table, slopes, sinks, out, lse,
    queries, group, kv_heads, row_blocks, splits, capacity, blocks, page, scale, left, right, cap,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_s, o_b, o_h, o_t, l_s, l_b, l_h,
    length_stride, pad_stride, table_b, table_i, slope_b, slope_h,
    FORM: tl.constexpr, PADDED: tl.constexpr, PAGED: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = program % splits
    block = program // splits % row_blocks
    kv_head = (program // (splits * row_blocks) % kv_heads).to(tl.int64)
    b = (program // (splits * row_blocks) // kv_heads).to(tl.int64)

    start = tl.cast(0, tl.int64)
    if PADDED:
        start = tl.load(leftpad + b * pad_stride).to(tl.int64)
    end = tl.cast(capacity, tl.int64)
    if lengths is not None:
        end = tl.load(lengths + b * length_stride).to(tl.int64)
    valid = (start >= 0) & (start <= end) & (end <= capacity)
    start = tl.where(valid, start, 0)
    keys = tl.where(valid, end - start, 0).to(tl.int32)

    row = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    held = row < queries * group
    token = row // group
    head = kv_head * group + row % group
    column = tl.arange(0, D)[None, :]
    column_v = tl.arange(0, DV)[None, :]
    at = b * q_b + head * q_h + token.to(tl.int64) * q_t
    x = tl.load(q + at + column, mask=held & (column < DIM), other=0.0)
    slope = 0.0
    if tile.ALIBI & FORM:
        slope = tl.load(slopes + b * slope_b + head * slope_h, mask=held, other=0.0)

    top = tl.full([BLOCK_M, 1], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M, 1], tl.float32)
    sums = tl.zeros([BLOCK_M, DV], tl.float32)
    if tile.SINKS & FORM:
        if split == 0:  # a key of weight exp(sink) and value 0
            top = tl.load(sinks + head, mask=held, other=-float("inf"))
            total = tl.where(top == -float("inf"), 0.0, 1.0)

    first = block * BLOCK_M // group
    count = (block * BLOCK_M + BLOCK_M - 1) // group - first + 1
    low, _full, _full_end, high = tile.key_range(first, count, queries, keys, left, right, FORM)
    part = tl.cdiv(tl.cdiv(high - low, splits), BLOCK_N) * BLOCK_N
    low = low + split * part
    high = tl.minimum(high, low + part)
    for begin in range(low, high, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        inside = key < high
        where = (start + key).to(tl.int32)
        there = inside
        in_block = b
        if PAGED:
            entry = table + b * table_b + (where // page).to(tl.int64) * table_i
            in_block = tl.load(entry, mask=inside, other=0).to(tl.int64)
            there = inside & (in_block >= 0) & (in_block < blocks)
            where = where % page
        where = where.to(tl.int64)
        rows = k + kv_head * k_h + in_block * k_b + where * k_t
        y = tile.rows_of(rows[:, None], there[:, None], 0, DIM, D, True)
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale
        if PAGED:  # a query that sees a key of no block
            s += tl.where(there | (inside == 0), 0.0, float("nan"))[None, :]
        s, _derivative = tile.modify_scores(
            s, token, key[None, :], queries, keys, left, right, slope, cap, 0, 0, FORM, True
        )
        s = tl.where(inside[None, :], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1)[:, None])
        # Nothing seen yet: -inf - -inf would be NaN.
        shift = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2((s - shift) * tile.LOG2E)
        fade = tl.exp2((top - shift) * tile.LOG2E)
        total = total * fade + tl.sum(p, 1)[:, None]
        rows = v + kv_head * v_h + in_block * v_b + where * v_t
        y = tile.rows_of(rows[:, None], there[:, None], 0, DIM_V, DV, True)
        sums = tl.dot(p.to(y.dtype), y, sums * fade, input_precision=PRECISION)
        top = new

    empty = total == 0.0
    value = sums / tl.where(empty, 1.0, total)
    whole = tl.where(empty, -float("inf"), top + tl.log(tl.where(empty, 1.0, total)))
    value = tl.where(valid, value, float("nan"))
    whole = tl.where(valid, whole, float("nan"))
    split = split.to(tl.int64)
    at = split * o_s + b * o_b + head * o_h + token.to(tl.int64) * o_t
    inside_v = held & (column_v < DIM_V)
    tl.store(out + at + column_v, value.to(out.dtype.element_ty), mask=inside_v)
    tl.store(lse + split * l_s + b * l_b + head * l_h + token, whole, mask=held)


@triton.jit
def attention_combine_kernel(
    parts, part_lse, out, lse, rows, queries, heads, splits, o_b, o_h, o_t,
    DIM_V: tl.constexpr, DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of parts [splits, rows, DIM_V], part_lse [splits, rows]."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    each = tl.load(part_lse + split * rows + row, mask=split < splits, other=-float("inf"))
    top = tl.max(each, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(each - shift), 0)
    safe = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + row, tl.where(total == 0.0, -float("inf"), shift + tl.log(safe)))
    column = tl.arange(0, DV)[None, :]
    sums = tl.zeros([1, DV], tl.float32)
    for begin in range(0, splits, BLOCK):
        some = (begin + tl.arange(0, BLOCK))[:, None]
        side = tl.load(part_lse + some * rows + row, mask=some < splits, other=-float("inf"))
        weight = tl.exp(side - shift) / safe
        inside = (some < splits) & (column < DIM_V)
        value = tl.load(parts + (some * rows + row) * DIM_V + column, mask=inside, other=0.0)
        sums += tl.sum(weight * value, 0)[None, :]
    batch = row // (heads * queries)
    at = batch * o_b + row // queries % heads * o_h + row % queries * o_t
    tl.store(out + at + column, sums.to(out.dtype.element_ty), mask=column < DIM_V)


# ---- launchers -----------------------------------------------------------------------------------


def _table(rows: int, dim: int, wide: bool, modified: bool) -> _config.Config:
    """Not measured yet; from ahead-of-time inspection. dim: the larger head dimension; wide: fp32;
    modified: more than a causal bound."""
    architecture = _launch.architecture()
    amd = architecture.startswith("gfx")
    most = 64 if dim <= 128 and not wide else 16 if dim > 128 and wide else 32
    block_m = min(16 if rows <= 16 else 32 if rows <= 32 else 64, most)
    block_n = (32 if wide else 64) if dim <= 128 else 16 if wide else 32
    small = wide and (modified or block_m * dim >= 1024)  # products in fp32 take registers
    if small:
        block_n = 16
    elif block_m == 64 and dim > 64 and architecture != "sm90":
        block_n = 32
    if amd:  # the masks of every row take scalar registers
        block_m = min(block_m, 16 if modified else 32)
        few = wide or modified or rows > 16 or dim > 256 or architecture == "gfx90a"
        block_n = 16 if few else 32
    stages = 1 if amd or dim > 128 or small else 2
    warps = 8 if dim > 128 or modified or (wide and dim > 64) or (amd and rows > 16) else 4
    if architecture == "sm120" and block_m == 64 and dim > 64:
        warps = 8
    if amd and wide and dim > 256:  # eight would leave a thread 256 registers
        warps = 4
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    wide = dtype == torch.float32
    for rows in (16, 32, 64):
        for dim in (16, 32, 64, 128, 256, 512):
            for modified in (False, True):
                yield (rows, dim, dtype, modified), _table(rows, dim, wide, modified)


def candidates(op: str, key: tuple[int, int, torch.dtype, bool]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table."""
    for block_m in (16, 32, 64):
        if block_m == 16 or block_m < 2 * key[0]:
            for block_n in (16, 32, 64, 128):
                for warps in (4, 8):
                    for stages in (1, 2):
                        yield {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps,
                               "num_stages": stages}  # fmt: skip


def _splits(programs: int, capacity: int) -> int:
    """So many parts that two programs run on each processor; from shapes alone."""
    wanted = cdiv(2 * _launch.processors(), programs)
    return max(1, min(wanted, cdiv(capacity, SPLIT_KEYS), MOST_SPLITS))


def divides_keys(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether attention's queries are so few that their programs would leave processors without
    work, and its keys so many that it is worth while to divide them."""
    rows = q.shape[2] * (q.shape[1] // max(k.shape[1], 1))
    widest = max(q.shape[3], v.shape[3])
    return rows <= MOST_ROWS and k.shape[2] >= 2 * SPLIT_KEYS and widest <= WIDEST


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    cache_leftpad: Tensor | None,
    causal: bool,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Tq, D] and the caches -> out, laid out as q is, and lse [B, Hq, Tq] fp32. Without
    cache_seqlens the caches are full."""
    batch, heads, queries, dim = q.shape
    kv_heads, page, dim_v = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    if max(dim, dim_v) > WIDEST:
        raise NotImplementedError(
            f"llmops.attention_kvcache: head_dim is {max(dim, dim_v)}, at most {WIDEST} is "
            "supported on backend 'triton'; use backend=\"reference\""
        )
    out = heads_like(q, dim_v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    q, k, v = dense(q), dense(k_cache), dense(v_cache)
    # Rows of a sequence are counted in 32 bits, whose division is cheap.
    capacity = min(page * (1 if block_table is None else block_table.shape[1]), 2**31 - 1)
    # Bounds as wide as all there is are none.
    left = window_left if window_left < queries + capacity else -1
    right = 0 if causal else window_right if window_right < queries + capacity else -1
    form = (
        (tile.LEFT.value if left >= 0 else 0)
        | (tile.RIGHT.value if right >= 0 else 0)
        | (tile.ALIBI.value if alibi_slopes is not None else 0)
        | (tile.SOFTCAP.value if softcap else 0)
        | (tile.SINKS.value if sinks is not None else 0)
    )
    group = heads // kv_heads
    widest = max(_rows.power_of_2(max(dim, dim_v)), 16)
    wide = q.dtype == torch.float32
    modified = form & ~tile.RIGHT.value != 0
    key = (_rows.power_of_2(queries * group), widest, q.dtype, modified)
    table = _table(queries * group, widest, wide, modified)
    config = _config.choose("attention_kvcache", key, table)
    # Told none of them, ptxas spills a few; short heads and a single token need fewer.
    large = wide or modified or widest > 128 or (widest == 128 and queries > 1)
    bound = all_registers(config["num_warps"]) if large else {}
    block_d, block_dv = padded(dim, dim_v, q.dtype)
    row_blocks = cdiv(queries * group, config["BLOCK_M"])
    programs = batch * kv_heads * row_blocks
    splits = _splits(programs, capacity)
    to, to_lse = out, lse
    strides: tuple[int, ...] = (0, *out.stride()[:3], 0, *lse.stride()[:2])
    if splits > 1:
        to = q.new_empty(splits, batch, heads, queries, dim_v, dtype=torch.float32)
        to_lse = q.new_empty(splits, batch, heads, queries, dtype=torch.float32)
        strides = (*to.stride()[:4], *to_lse.stride()[:3])
    slope_strides: Any = (0, 0)
    if alibi_slopes is not None:
        own = alibi_slopes.stride()
        slope_strides = own if len(own) == 2 else (0, *own)
    launch(
        attention_kvcache_fwd_kernel, (programs * splits,), q, k, v, cache_seqlens, cache_leftpad,
        block_table, alibi_slopes, sinks, to, to_lse, queries, group, kv_heads, row_blocks, splits,
        capacity, k.shape[0], page, scale, left, right, softcap, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *strides, 0 if cache_seqlens is None else cache_seqlens.stride(0),
        0 if cache_leftpad is None else cache_leftpad.stride(0),
        *((0, 0) if block_table is None else block_table.stride()), *slope_strides,
        FORM=form, PADDED=cache_leftpad is not None, PAGED=block_table is not None,
        PRECISION="ieee", DIM=dim, DIM_V=dim_v, D=block_d, DV=block_dv, **config, **bound,
    )  # fmt: skip
    if splits > 1:
        rows = batch * heads * queries
        launch(
            attention_combine_kernel, (rows,), to, to_lse, out, lse, rows, queries, heads, splits,
            *out.stride()[:3], DIM_V=dim_v, DV=max(_rows.power_of_2(dim_v), 16),
            SPLITS=_rows.power_of_2(splits), BLOCK=4, num_warps=2,
        )  # fmt: skip
    return out, lse
