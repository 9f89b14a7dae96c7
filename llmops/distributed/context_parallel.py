"""Attention over a sequence that is split over processes: keys and values travel around a ring.

    step s:   rank r holds the keys and values of rank r - s, attends to them, merges by lse
    forward:  ranks - 1 messages of one rank's K and V, each sent while the step before computes
    backward: the same, and dK, dV (fp32) travel behind their K and V to their owner: ranks messages

A causal sequence is cut into 2 * ranks chunks, of which rank r has number r and number
2 * ranks - 1 - r. In every step but the first it then attends to half of its score matrix, all
ranks to equally much: nobody waits. With 2 ranks:

    rank 0: chunks 0, 3        keys   0 1 2 3        step 0 (own keys)   step 1 (the other's)
    rank 1: chunks 1, 2    query 0    x . . .        rank 0: 00 30 33    rank 0: 31 32
                                 1    x x . .        rank 1: 11 21 22    rank 1: 10 20
                                 2    x x x .
                                 3    x x x x

Memory per rank is O(T / ranks), since scores are never held and two parts of K and V are.

Source: Liu et al., "Ring Attention with Blockwise Transformers", 2023 (arXiv 2310.01889); the merge
is flash-decoding's; the balance of work, Brandon et al., "Striped Attention", 2023, here by
chunks from both ends ("zig-zag"), as in Llama 3's context parallelism.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from llmops.dispatch import resolve
from llmops.ops import _autocast
from llmops.ops.attention import PLAIN
from llmops.ops.attention import _check_tensors as check_tensors
from llmops.ops.merge_attention import merge_attention

Group = dist.ProcessGroup | DeviceMesh | None
_OP = "distributed.context_parallel_attention"


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`llmops.attention` of a sequence whose tokens are split over the ranks of a group.

    >>> x = shard_sequence(x, 1, causal=True)  # this rank's tokens of [B, T, C]
    >>> at = sequence_positions(T, causal=True)  # where they stand: rope's position_ids
    >>> out = context_parallel_attention(q, k, v, causal=True)

    Args:
        q: [B, Hq, Tq / ranks, D], this rank's tokens, as in `llmops.attention`.
        k, v: [B, Hkv, Tk / ranks, D or Dv], as many tokens on every rank.
        group: a ProcessGroup or a DeviceMesh of one dimension; the default group when None. All
            its ranks call with the same shapes and arguments.
        causal: the tokens are those of `shard_sequence(..., causal=True)`, with Tq = Tk.
        scale, return_lse, backend: as in `llmops.attention`.

    Returns:
        out [B, Hq, Tq / ranks, Dv], the rows of this rank's queries; with return_lse also lse.
        Differentiable once.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call; a double backward.

    Numerics: partial results are merged in fp32. Deterministic, as every rank's order is fixed.
    """
    if _autocast.enabled(q):
        q, k, v, _ = _autocast.lowered(q, k, v, None)
    check_tensors(q, k, v, None)
    ring = _Ring(_process_group(group))
    if causal and (q.shape[2] != k.shape[2] or q.shape[2] % 2):
        raise ValueError(
            f"llmops.{_OP}: with causal, q and k hold the same even number of tokens, two chunks "
            f"of shard_sequence(..., causal=True); got {q.shape[2]} and {k.shape[2]}"
        )
    name = resolve("attention", q.device, q.dtype, ("causal",) if causal else (), backend)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3]) if q.shape[3] else 1.0
    out, lse = _ContextParallel.apply(q, k, v, ring, causal, scale, name)
    return (out, lse) if return_lse else out


def shard_sequence(x: Tensor, dim: int, *, group: Group = None, causal: bool = False) -> Tensor:
    """This rank's tokens of x, which every rank has whole; dimension `dim` counts tokens.

    Plain, rank r has the r-th of equal parts. causal: chunks r and 2 * ranks - 1 - r of 2 * ranks,
    which gives all ranks the same work in causal attention.
    """
    ring = _Ring(_process_group(group))
    pieces = _pieces(ring, x.shape[dim], causal)
    size = x.shape[dim] // (len(pieces) * ring.ranks)
    return torch.cat([x.narrow(dim, piece * size, size) for piece in pieces], dim)


def unshard_sequence(x: Tensor, dim: int, *, group: Group = None, causal: bool = False) -> Tensor:
    """The whole sequence, in order, from every rank's `shard_sequence`; takes no gradient."""
    ring = _Ring(_process_group(group))
    mine = x.detach().movedim(dim, 0).contiguous()
    parts = mine.new_empty((ring.ranks, *mine.shape))
    dist.all_gather(list(parts.unbind()), mine, group=ring.group)
    if causal:
        _pieces(ring, ring.ranks * len(mine), causal)
        first, second = parts.unflatten(1, (2, -1)).unbind(1)
        parts = torch.cat((first, second.flip(0)))
    return parts.flatten(0, 1).movedim(0, dim)


def sequence_positions(
    length: int,
    *,
    group: Group = None,
    causal: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Where this rank's tokens stand in a sequence of `length`: `shard_sequence` of 0, 1, 2, ...

    int64, for `llmops.rope` (position_ids) and learned positions.
    """
    return shard_sequence(torch.arange(length, device=device), 0, group=group, causal=causal)


# ---- the ring ------------------------------------------------------------------------------------


def _process_group(group: Group) -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise RuntimeError(
            "llmops.distributed: there is no process group; call "
            "torch.distributed.init_process_group first, as under torchrun"
        )
    if isinstance(group, DeviceMesh):
        return group.get_group()  # says itself that it wants one dimension
    found = group if group is not None else dist.group.WORLD
    assert found is not None
    return found


class _Ring:
    """A group's ranks in a circle."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("llmops.distributed: this process is not a member of group")
        neighbours = ((self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks)
        self.next, self.previous = (dist.get_global_rank(group, rank) for rank in neighbours)

    def send_on(self, buffer: Tensor) -> _Arriving:
        return _Arriving(self, buffer)


class _Arriving:
    """`buffer` on its way to the next rank, and the previous rank's on its way here."""

    def __init__(self, ring: _Ring, buffer: Tensor) -> None:
        self.sent, self.received = buffer, torch.empty_like(buffer)
        # One batch: with NCCL, a send and a receive one after the other wait for each other.
        self.works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, ring.next, ring.group),
                dist.P2POp(dist.irecv, self.received, ring.previous, ring.group),
            ]
        )

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _pieces(ring: _Ring, length: int, causal: bool) -> tuple[int, ...]:
    """The numbers of a rank's chunks."""
    count = 2 * ring.ranks if causal else ring.ranks
    if length % count:
        raise ValueError(
            f"llmops.distributed: {length} tokens do not divide into {count} equal chunks, "
            f"{'two' if causal else 'one'} for each of {ring.ranks} ranks; pad the sequence to "
            f"{-(-length // count) * count}"
        )
    return (ring.rank, count - 1 - ring.rank) if causal else (ring.rank,)


def _pack(k: Tensor, v: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """K and V in one buffer: one message per step."""
    buffer = k.new_empty(k.numel() + v.numel(), dtype=dtype)
    for part, given in zip(_unpack(buffer, k, v), (k, v), strict=True):
        part.copy_(given)
    return buffer


def _unpack(buffer: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Views in `buffer` with the shapes of k and v."""
    return buffer[: k.numel()].view(k.shape), buffer[k.numel() :].view(v.shape)


def _seen(rank: int, source: int, tokens: int, causal: bool) -> tuple[slice, slice, bool]:
    """(queries, keys, causal) of what a rank's queries see of the keys of rank `source`."""
    everything, half = slice(None), tokens // 2
    if not causal or source == rank:
        return everything, everything, causal
    if source < rank:  # its first chunk is before both of ours, its second behind both
        return everything, slice(half), False
    return slice(half, None), everything, False  # both are between ours


class _ContextParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring, causal: bool, scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wide = torch.promote_types(q.dtype, torch.float32)
        buffer = _pack(k, v)
        for step in range(ring.ranks):
            arriving = ring.send_on(buffer) if step + 1 < ring.ranks else None
            source = (ring.rank - step) % ring.ranks
            rows, columns, diagonal = _seen(ring.rank, source, k.shape[2], causal)
            keys, values = _unpack(buffer, k, v)
            part, part_lse = torch.ops.llmops.attention(
                q[:, :, rows], keys[:, :, columns], values[:, :, columns], None, diagonal, scale,
                *PLAIN, backend,
            )  # fmt: skip
            if step == 0:
                result, out, lse = part, part.to(wide), part_lse
            else:
                merged = merge_attention(
                    out[:, :, rows], lse[:, :, rows], part.to(wide), part_lse, backend=backend
                )
                for whole, new in zip((out, lse), merged, strict=True):
                    whole[:, :, rows].copy_(new)
            if arriving is not None:
                buffer = arriving.wait()
        result.copy_(out)  # in q's dtype and layout
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.how = ring, causal, scale, backend
        ctx.set_materialize_grads(False)
        return result, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring, causal, scale, backend = ctx.how
        if grad is None:
            if grad_lse is None:
                return (None,) * 7
            grad = torch.zeros_like(out)
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        buffer = _pack(k, v)
        sums = torch.zeros_like(buffer, dtype=wide)  # dK and dV of the rank in `buffer`
        behind = None
        for step in range(ring.ranks):
            arriving = ring.send_on(buffer) if step + 1 < ring.ranks else None
            source = (ring.rank - step) % ring.ranks
            rows, columns, diagonal = _seen(ring.rank, source, k.shape[2], causal)
            keys, values = (x[:, :, columns] for x in _unpack(buffer, k, v))
            dlse = None if grad_lse is None else grad_lse[:, :, rows]
            # With the lse and out of all keys, exp(s - lse) and delta are those of the whole.
            dq_part, dk, dv, _, _ = torch.ops.llmops.attention_bwd(
                grad[:, :, rows], dlse, q[:, :, rows], keys, values, None, out[:, :, rows],
                lse[:, :, rows], diagonal, scale, False, *PLAIN, backend,
            )  # fmt: skip
            dq[:, :, rows] += dq_part
            if behind is not None:
                sums = behind.wait()
            for total, term in zip(_unpack(sums, k, v), (dk, dv), strict=True):
                total[:, :, columns] += term
            if ring.ranks > 1:
                behind = ring.send_on(sums)
            if arriving is not None:
                buffer = arriving.wait()
        if behind is not None:
            sums = behind.wait()
        dk, dv = (x.to(k.dtype) for x in _unpack(sums, k, v))
        return dq.to(q.dtype), dk, dv, None, None, None, None
