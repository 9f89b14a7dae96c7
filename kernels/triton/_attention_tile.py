"""What every attention kernel shares: which keys a query sees, what happens to its scores, and the
step from scores to weights and their gradient.

    s[t, j] = cap(scale * q[t] . k[j]) - slope * |d| + mask[t, j],  d = j - (t + Tk - Tq),
              -inf where masked, d > right (0 if causal) or d < -left;  cap(x) = c tanh(x / c)
    P = exp(s - lse),  dS = P * (z * (dout . v) - delta),  z: dropout's factor,
    delta = dout . out - dlse

The score modifiers are bits of one constexpr, FORM: a kernel holds the code of those in use and of
no other. All helpers are element-wise: queries may run along rows (query [M, 1], key [1, N]) or
along columns (query [1, M], key [N, 1]), and a query's slope, head and mask pointers may be scalars
or differ from row to row.

Scores are in units of log2 (scale * log2 e folded in), and natural where NATURAL is in FORM: an
additive mask may hold the lowest finite number, which times log2 e would be -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

BOOL_MASK = tl.constexpr(1)
ADDED_MASK = tl.constexpr(2)
ALIBI = tl.constexpr(4)
SOFTCAP = tl.constexpr(8)
SINKS = tl.constexpr(16)
DROPOUT = tl.constexpr(32)
LEFT = tl.constexpr(64)  # a window bounds the keys before a query
RIGHT = tl.constexpr(128)  # a window or causality bounds those after it
VARLEN = tl.constexpr(256)  # sequences of unequal lengths, one after the other
NATURAL = tl.constexpr(512)
NEGATIVE = tl.constexpr(1024)  # the scale is
# Any of these: one loop that compares everything; two copies spill.
GENERAL = tl.constexpr(1 | 2 | 4 | 8 | 32 | 64)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence(cu_seqlens, batch, total, FORM: tl.constexpr):
    """Where the rows of a batch item begin, and how many there are; within `total` in any case."""
    if VARLEN & FORM:
        start = tl.maximum(tl.load(cu_seqlens + batch).to(tl.int64), 0)
        end = tl.minimum(tl.load(cu_seqlens + batch + 1).to(tl.int64), total)
        return start, tl.maximum(end - start, 0).to(tl.int32)
    else:
        return tl.cast(0, tl.int64), tl.cast(total, tl.int32)


@triton.jit
def key_range(first, count, queries, keys, left, right, FORM: tl.constexpr):
    """No query of [first, first + count) sees a key outside [begin, end); all of them see all of
    [full_begin, full_end)."""
    begin, full_begin, end, full_end = 0, 0, keys, keys
    shift = keys - queries  # bottom-right alignment: the last query is at the last key
    last = tl.minimum(first + count, queries) - 1
    if RIGHT & FORM:
        end = tl.maximum(tl.minimum(last + shift + right + 1, keys), 0)
        full_end = tl.maximum(tl.minimum(first + shift + right + 1, keys), 0)
    if LEFT & FORM:
        begin = tl.minimum(tl.maximum(first + shift - left, 0), end)
        full_begin = tl.maximum(last + shift - left, 0)
    return begin, full_begin, full_end, end


@triton.jit
def query_range(first, count, queries, keys, left, right, FORM: tl.constexpr):
    """The same of the queries that see the keys [first, first + count)."""
    begin, full_begin, end, full_end = 0, 0, queries, queries
    shift = keys - queries
    last = tl.minimum(first + count, keys) - 1
    if LEFT & FORM:
        end = tl.maximum(tl.minimum(last - shift + left + 1, queries), 0)
        full_end = tl.maximum(tl.minimum(first - shift + left + 1, queries), 0)
    if RIGHT & FORM:
        begin = tl.minimum(tl.maximum(first - shift - right, 0), end)
        full_begin = tl.maximum(last - shift - right, 0)
    return begin, full_begin, full_end, end


@triton.jit
def block_range(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """Such a range in blocks: cut ones in [begin, a), full ones in [a, b), cut ones in [b, end)."""
    a = tl.minimum((full_begin + BLOCK - 1) // BLOCK * BLOCK, end)
    return begin // BLOCK * BLOCK, a, tl.maximum(full_end // BLOCK * BLOCK, a)


@triton.jit
def rows_of(rows, keep, part, DIM: tl.constexpr, BLOCK: tl.constexpr, CUT: tl.constexpr):
    """Columns part * BLOCK and on of the rows at pointers `rows` [N, 1]; zeros where not kept."""
    d = part * BLOCK + tl.arange(0, BLOCK)[None, :]
    padded: tl.constexpr = DIM % BLOCK != 0 or DIM == 0
    if CUT:
        if padded:
            return tl.load(rows + d, mask=keep & (d < DIM), other=0.0)
        else:
            return tl.load(rows + d, mask=keep, other=0.0)
    else:
        if padded:
            return tl.load(rows + d, mask=d < DIM, other=0.0)
        else:
            return tl.load(rows + d)


@triton.jit
def tile_of(tiles, batch, head, row, part, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The same of ROWS rows from `row` on, all kept, by a descriptor of [B, H, T, D]: TMA copies
    them, and puts zeros where D ends."""
    return tl.reshape(tiles.load([batch, head, row, part * BLOCK]), [ROWS, BLOCK])


@triton.jit
def product(
    a, a_rows, a_keep, b, b_rows, b_keep, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T, fp32: of the tiles where they are whole, else of chunks of D loaded here."""
    if DIM <= BLOCK:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        sums = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
        for part in range((DIM + BLOCK - 1) // BLOCK):
            x = rows_of(a_rows, a_keep, part, DIM, BLOCK, True)
            y = rows_of(b_rows, b_keep, part, DIM, BLOCK, True)
            sums = tl.dot(x, tl.trans(y), sums, input_precision=PRECISION)
        return sums


@triton.jit
def tanh(x):
    """Cephes' tanhf: a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel."""
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z
    near = ((p + 1.33314422036e-1) * z - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def modify_scores(
    s, query, key, queries, keys, left, right, slope, cap, mask_rows, mask_n, FORM: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Scaled products -> scores, -inf where dropped; and the soft cap's derivative.

    slope: ALiBi's, of the query's head. mask_rows: pointers to the queries' mask rows. CUT: whether
    keys may lie beyond the sequence or a query's window.
    """
    distance = key - query - (keys - queries)
    keep = key < keys
    if CUT:
        if LEFT & FORM:
            keep = keep & (distance >= -left)
        if RIGHT & FORM:
            keep = keep & (distance <= right)
    derivative = s
    if SOFTCAP & FORM:
        t = tanh(s / cap)
        s = cap * t
        derivative = 1.0 - t * t
    if ALIBI & FORM:
        s -= slope * tl.abs(distance).to(tl.float32)
    if (BOOL_MASK | ADDED_MASK) & FORM:
        m = mask_rows + key.to(tl.int64) * mask_n
        loaded = keep & (query < queries)
        if BOOL_MASK & FORM:
            s = tl.where(tl.load(m, mask=loaded, other=0) != 0, s, -float("inf"))
        else:
            added = tl.load(m, mask=loaded, other=0.0).to(tl.float32)
            # Compared, not only added: a dropped key stays dropped where its score is inf or NaN.
            s = tl.where(added == -float("inf"), added, s + added)
    if CUT:
        s = tl.where(keep, s, -float("inf"))
    return s, derivative


@triton.jit
def dropped(
    seed, head, query, first, below, BLOCK: tl.constexpr, QUERIES_IN_ROWS: tl.constexpr
):  # fmt: skip
    """Which weights of BLOCK keys from `first` (a multiple of 4) on are dropped, bool.

    Philox-4x32-10 of the seed, counter (key // 4, query, batch * Hq + head, 0); word key % 4
    belongs to the key. query: [M, 1] or [1, M], head: a scalar or as query.
    """
    if not QUERIES_IN_ROWS:
        query = tl.trans(query)
    counter = (first // 4 + tl.arange(0, BLOCK // 4))[None, :]
    like = query * 0 + counter * 0
    w0, w1, w2, w3 = tl.philox(seed, like + counter, like + query, like + head, like)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    drop = words < tl.cast(below, tl.uint32)
    if not QUERIES_IN_ROWS:
        drop = tl.trans(drop.to(tl.int8)) != 0
    return drop


@triton.jit
def weights_and_gradients(
    s, dp, lse, delta, norm, drop, keep_scale, derivative, FORM: tl.constexpr
):  # fmt: skip
    """P as it multiplied v (less dropout's 1 / (1 - p)), dS, and dS before the soft cap."""
    if NATURAL & FORM:
        p = tl.exp2((s - lse) * LOG2E) * norm
    else:
        p = tl.exp2(s - lse)
    kept = p
    if DROPOUT & FORM:
        dp = tl.where(drop, 0.0, dp * keep_scale)
        kept = tl.where(drop, 0.0, p)
    ds = p * (dp - delta)
    dx = ds
    if SOFTCAP & FORM:
        dx = ds * derivative
    return kept, ds, dx
