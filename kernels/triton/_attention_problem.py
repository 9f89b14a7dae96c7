"""What the launchers of attention, forward and backward, share: block sizes, what `llmops tune`
tries, and the arguments and constants of a call's kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from llmops.kernels.triton import _attention_tile as tile
from llmops.kernels.triton import _config, _rows
from llmops.kernels.triton._attention_tile import (
    ADDED_MASK,
    ALIBI,
    BOOL_MASK,
    DROPOUT,
    GENERAL,
    NATURAL,
    NEGATIVE,
    SINKS,
)
from llmops.kernels.triton._launch import all_registers, architecture, cdiv, has_tma
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def heads_like(like: Tensor, dim: int) -> Tensor:
    """Empty [B, H, T, dim], laid out as `like` is: the heads of a token together where they are."""
    b, h, t, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(b, t, h, dim).transpose(1, 2)
    return like.new_empty(b, h, t, dim)


def dense(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor | None:
    """x [B, H, T, D] in tiles of rows x columns; None where TMA cannot address it, or only may: of
    an expanded tensor's strides of 0 CUDA promises nothing. Made on the host: a descriptor made in
    a kernel wants an allocator, which Triton has once for the whole process."""
    size = x.element_size()
    fits = (
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(s * size % 16 == 0 and 0 < s * size < 2**40 for s in x.stride()[:3])
        and all(0 < n < 2**31 for n in x.shape)
        and max(rows, columns) <= 256
    )
    return TensorDescriptor(x, [*x.shape], [*x.stride()], [1, 1, rows, columns]) if fits else None


def padded(dim: int, dim_v: int, dtype: torch.dtype) -> tuple[int, int]:
    """The widths of K's and V's tiles, powers of two.

    On Hopper V's is in 16 bits at least as wide as K's or 64. A narrower tile has another swizzle;
    where both share a piece of shared memory (rows that cp.async cannot copy, or one stage), CUDA's
    assembler before 12.9.86, and so Triton up to 3.7, takes the addresses of all but the first 16
    keys' values from registers that nothing has written: wrong results, seen on an H100.
    """
    block_d, block_dv = (max(_rows.power_of_2(d), 16) for d in (dim, dim_v))
    if dtype != torch.float32 and architecture() == "sm90":
        block_dv = max(block_dv, min(block_d, 64))
    return block_d, block_dv


def table(dim: int, dtype: torch.dtype, backward: bool, keys: int, form: int) -> _config.Config:
    """Blocks, warps, stages and the chunk of D: not measured; from ahead-of-time inspection, the
    largest that spill nothing."""
    if architecture() == "interpreter":  # few programs, yet of several blocks in the tests
        return {"BLOCK_M": 64, "BLOCK_N": 64 if keys <= 256 else 256, "CHUNK": 256}
    amd = architecture().startswith("gfx")
    if dtype == torch.float32 or dim > 128:
        chunk = 64 if dtype == torch.float32 or amd else 128
        warps = 4 if amd else 8
        return {"BLOCK_M": 32, "BLOCK_N": 32, "CHUNK": chunk, "num_warps": warps, "num_stages": 1,
                **all_registers(warps)}  # fmt: skip
    warps = 8 if dim > 64 else 4
    if backward and dim > 64 and architecture() == "sm90" and not form & GENERAL.value:
        # Measured on an H100 (16 x 1024 tokens, causal, bf16): a warp group's product is of 64
        # rows, so one group holds 64. It spills, in dk and dv; but eight warps with 128 rows and
        # half of the keys at a time, which spill nothing, took 1.4 times as long, and with 64 rows,
        # of which each group took half of the columns, 2.7 times.
        return {"BLOCK_M": 64, "BLOCK_N": 64, "CHUNK": 128, "num_warps": 4, "num_stages": 2}
    if backward or form & GENERAL.value:
        walked = 16 if dim > 64 and (amd or form & DROPOUT.value) else 32
        # Told none of them, ptxas takes 96 of heads of 16, and spills.
        few = architecture() == "sm100" or dim <= 16
        bound = all_registers(warps) if few else {}
        return {"BLOCK_M": 64, "BLOCK_N": walked, "CHUNK": 128, "num_warps": warps,
                "num_stages": 1, **bound}  # fmt: skip
    walked = 32 if amd and dim > 64 else 64
    return {"BLOCK_M": 128, "BLOCK_N": walked, "CHUNK": 128, "num_warps": warps, "num_stages": 2}


def entries(op: str, dtype: torch.dtype) -> Iterator[tuple[_config.Key, _config.Config]]:
    """The last head dimension stands for all that are divided in chunks."""
    for dim in (16, 32, 64, 128) if dtype == torch.float32 else (16, 32, 64, 128, 256):
        for form in (0, BOOL_MASK.value, DROPOUT.value):
            general = form & GENERAL.value != 0
            yield (dim, dtype, general), table(dim, dtype, op == "attention_bwd", 4096, form)


def candidates(op: str, key: tuple[int, torch.dtype, bool]) -> Iterator[_config.Config]:
    """What `llmops tune` tries beside the table; CHUNK stays the table's. Backward, BLOCK_M is what
    a program holds and BLOCK_N what it walks over, and both forms of dQ are tried. Forward, full
    blocks come by pointers, and by descriptors where TMA is there and another stage to fill."""
    dim, dtype, general = key
    backward = op == "attention_bwd"
    forms: list[_config.Config] = [{}]
    if backward:
        forms = [{"ONE_PASS": False}, {"ONE_PASS": True}]
    elif has_tma() and not general and dim <= table(dim, dtype, False, 0, 0)["CHUNK"]:
        forms = [{"DESCRIPTORS": False}, {"DESCRIPTORS": True}]
    narrow = dtype == torch.float32 or dim > 128
    for held in (32, 64) if narrow else (64, 128):
        for walked in (16, 32) if narrow else (32, 64, 128):
            for warps in (4, 8):
                for stages in (1, 2) if narrow or backward or general else (1, 2, 3):
                    for form in forms if stages > 1 or backward else forms[:1]:
                        yield {"BLOCK_M": held, "BLOCK_N": walked, "num_warps": warps,
                               "num_stages": stages, **form}  # fmt: skip


# Beyond it exp(s - lse) is normalized anew: an ulp of lse is a factor then.
LARGEST_PLAIN_SCALE = 1024.0


class Problem:
    """What the launchers of one call share: `arguments` and `constants` of every kernel."""

    def __init__(
        self, op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool,
        scale: float, modifiers: tuple[Any, ...], varlen: tuple[Any, ...] | None, backward: bool,
    ) -> None:  # fmt: skip
        left, right, slopes, softcap, sinks, dropout_p, seed = modifiers
        q, k, v = dense(q), dense(k), dense(v)
        self.heads, self.kv_heads = q.shape[1], k.shape[1]
        self.batch, self.queries, self.keys = q.shape[0], q.shape[2], k.shape[2]
        cu_q = cu_k = None
        q_b, k_b, v_b = q.stride(0), k.stride(0), v.stride(0)
        form = 0
        if varlen is not None:
            cu_q, cu_k, self.queries, self.keys = varlen
            cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
            self.batch, q_b, k_b, v_b = cu_q.shape[0] - 1, 0, 0, 0
            form |= tile.VARLEN.value
        self.varlen, self.q, self.k, self.v = varlen is not None, q, k, v
        # Bounds as wide as all there is are none; this also keeps sums with them from overflow.
        widest = self.queries + self.keys
        left, right = (n if 0 <= n < widest else -1 for n in (left, right))
        right = 0 if causal else right
        form |= tile.LEFT.value if left >= 0 else 0
        form |= tile.RIGHT.value if right >= 0 else 0
        self.mask, mask_strides = mask, (0, 0, 0, 0)
        if mask is not None:
            form |= BOOL_MASK.value if mask.dtype == torch.bool else ADDED_MASK.value
            full = (self.batch, self.heads, self.queries, self.keys)
            mask_strides = mask.expand(full).stride()  # type: ignore[assignment]
        slope_b = slope_h = 0
        if slopes is not None:
            form |= ALIBI.value
            slope_b, slope_h = slopes.stride(0) if slopes.dim() == 2 else 0, slopes.stride(-1)
        form |= tile.SOFTCAP.value if softcap else 0
        form |= SINKS.value if sinks is not None else 0
        form |= DROPOUT.value if dropout_p else 0
        natural = ADDED_MASK.value | ALIBI.value | tile.SOFTCAP.value | SINKS.value
        form |= NATURAL.value if form & natural or abs(scale) > LARGEST_PLAIN_SCALE else 0
        form |= NEGATIVE.value if scale < 0 else 0
        below = min(int(dropout_p * 2**32 + 0.5), 2**32 - 1)
        keep = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
        dim, dim_v = q.shape[3], v.shape[3]
        chosen = table(max(dim, dim_v), q.dtype, backward, self.keys, form)
        key = (_rows.power_of_2(max(dim, dim_v)), q.dtype, form & GENERAL.value != 0)
        config = dict(_config.choose(op, key, chosen))
        # The backward's form of dQ that adds atomically. Its blocks were found for it.
        self.one_pass = config.pop("ONE_PASS", False)
        if self.one_pass and torch.are_deterministic_algorithms_enabled():
            self.one_pass, config = False, dict(chosen)
        self.descriptors = config.pop("DESCRIPTORS", False)
        chunk = config.pop("CHUNK")
        block_d, block_dv = padded(dim, dim_v, q.dtype)
        self.constants = {
            "DIM": dim, "DIM_V": dim_v, "FORM": form, "PRECISION": "ieee", **config,
            "BLOCK_D": min(block_d, chunk), "BLOCK_DV": min(block_dv, chunk),
        }  # fmt: skip
        self.sinks, self.seed = sinks, seed
        self.arguments = (
            q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, q_b, *q.stride()[1:3], k_b,
            *k.stride()[1:3], v_b, *v.stride()[1:3], *mask_strides, slope_b, slope_h, self.heads,
            self.heads // max(self.kv_heads, 1), self.rows(q), self.rows(k), scale, left, right,
            softcap, below, keep,
        )  # fmt: skip

    def rows(self, x: Tensor) -> int:
        """What kernels get as the number of queries or keys: packed, of all sequences."""
        return x.shape[2]

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        return 0 if self.varlen else x.stride(0), x.stride(1), x.stride(2)

    def tiles(self) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
        """Descriptors of K and V, for the full blocks of a kernel that has them; None where their
        rows come by pointers: both, so that there are two forms of a kernel, not four."""
        known = self.constants
        whole = known["DIM"] <= known["BLOCK_D"] and not known["FORM"] & GENERAL.value
        if not self.descriptors or not whole or not has_tma():
            return None, None
        k = described(self.k, known["BLOCK_N"], known["BLOCK_D"])
        v = described(self.v, known["BLOCK_N"], known["BLOCK_DV"])
        return (None, None) if k is None or v is None else (k, v)

    def parts(self, *dims: str) -> int:
        """Programs that share a block: one per chunk of the outputs' last dimension."""
        of = {"DIM": "BLOCK_D", "DIM_V": "BLOCK_DV"}
        return max(cdiv(max(self.constants[d], 1), self.constants[of[d]]) for d in dims)
