"""Cross entropy of DTensors: the mean over tokens of all ranks, and logits split by vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from llmops.ops.cross_entropy import check_range


def _replicated(x: Tensor) -> Tensor:
    """A number that every rank knows: .item() of a Partial one would be this rank's term."""
    assert isinstance(x, DTensor)
    return x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)


def _over(total: Tensor, count: Tensor) -> Tensor:
    return _replicated(total) / _replicated(count)


def _divisor(target: Tensor, weight: Tensor | None, kept: Tensor) -> Tensor:
    """What the mean divides by: how many targets count, or the sum of their weights."""
    if weight is None:
        return kept.sum()
    own = F.embedding(torch.where(kept, target, 0), weight.detach().float()[:, None])
    return (own[..., 0] * kept).sum()


def cross_entropy(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float,
    z_loss: float, reduction: str, dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    """`llmops.cross_entropy` of DTensors x [..., C] and target [...], class indices."""
    kept = target != ignore_index
    if isinstance(x, DTensor) and any(p.is_shard(x.ndim - 1) for p in x.placements):
        if weight is not None:
            raise NotImplementedError(
                "llmops.cross_entropy: weight does not go with logits that are sharded by class; "
                "drop it, or gather them: input.redistribute(placements=[Replicate()])"
            )
        how = (ignore_index, label_smoothing, z_loss)
        losses = _over_vocabulary(x, target, how, backend)
        if reduction == "none":
            return losses.to(dtype)
        total = losses.sum()
        return (_replicated(total) if reduction == "sum" else _over(total, kept.sum())).to(dtype)
    op = torch.ops.llmops.cross_entropy
    if reduction == "none":
        return op(
            x, target, weight, ignore_index, label_smoothing, z_loss, "none", dtype, backend
        )[0]  # fmt: skip
    # Class weights weigh the losses, not the squares of z_loss, whose mean is another.
    apart = reduction == "mean" and weight is not None and z_loss > 0.0
    total, lse = op(
        x, target, weight, ignore_index, label_smoothing, 0.0 if apart else z_loss, "sum",
        torch.float32, backend,
    )  # fmt: skip
    if reduction == "sum":
        return _replicated(total).to(dtype)
    loss = _over(total, _divisor(target, weight, kept))
    if apart:
        loss = loss + z_loss * _over((lse * lse).sum(), kept.sum())
    return loss.to(dtype)


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    weight: Tensor | None, ignore_index: int, label_smoothing: float, reduction: str,
    dtype: torch.dtype, wanted: tuple[bool, bool, bool], backend: str,
) -> Tensor:  # fmt: skip
    """`llmops.linear_cross_entropy` of DTensors input [N, D] and linear_weight [V, D]. With the
    vocabulary split, each rank holds its part of the logits, [N, V / ranks]."""
    if isinstance(linear_weight, DTensor) and any(p.is_shard(0) for p in linear_weight.placements):
        logits = F.linear(input, linear_weight, linear_bias)
        return cross_entropy(
            logits, target, weight, ignore_index, label_smoothing, 0.0, reduction, dtype, backend
        )
    rows = reduction == "none"
    loss: Tensor = torch.ops.llmops.linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing,
        "none" if rows else "sum", dtype if rows else torch.float32, *wanted, False, backend,
    )[0]  # fmt: skip
    if rows:
        return loss
    if reduction == "sum":
        return _replicated(loss).to(dtype)
    return _over(loss, _divisor(target, weight, target != ignore_index)).to(dtype)


# ---- logits split by class -----------------------------------------------------------------------


def _over_vocabulary(
    x: DTensor, target: Tensor, how: tuple[int, float, float], backend: str
) -> Tensor:
    """The rows' losses, fp32, of logits [..., C] whose classes are split over one dimension of the
    mesh. What travels is three numbers per row and rank, not the logits."""
    mesh, last = x.device_mesh, x.ndim - 1
    split = next(i for i, p in enumerate(x.placements) if p.is_shard(last))
    logits, rows = [], []
    for i, placement in enumerate(x.placements):
        by_row = isinstance(placement, Shard) and placement.dim < last
        logits.append(Shard(last) if i == split else placement if by_row else Replicate())
        rows.append(placement if by_row else Replicate())
    if not isinstance(target, DTensor):
        raise TypeError(
            "llmops.cross_entropy: input is a DTensor and target is not; distribute it, e.g. "
            "distribute_tensor(target, input.device_mesh, [Replicate()])"
        )
    check_range("cross_entropy", target.to_local(), x.shape[-1], how[0])
    local = _LossOverVocabulary.apply(
        x.redistribute(placements=logits).to_local(),
        target.redistribute(placements=rows).to_local(),
        x.shape[-1],
        mesh,
        split,
        how,
        backend,
    )
    stride = torch.empty(target.shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, rows, run_check=False, shape=target.shape, stride=stride
    )  # fmt: skip


class _LossOverVocabulary(torch.autograd.Function):
    """Of a rank's own classes the kernel gives the log-sum-exp and, where the target is one of
    them, its logit. Log-sum-exps merge as in attention: loss = log sum_r exp(lse_r) - x[target].

    Source: Shoeybi et al., "Megatron-LM", 2019, section 3.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, classes: int, mesh: DeviceMesh, split: int,
        how: tuple[int, float, float], backend: str,
    ) -> Tensor:  # fmt: skip
        ignore_index, label_smoothing, z_loss = how
        ranks, width = mesh.size(split), x.shape[-1]
        first = mesh.get_local_rank(split) * -(-classes // ranks)
        kept = target != ignore_index
        own = kept & (target >= first) & (target < first + width)
        # A row whose target another rank has takes class 0 in its place, and no gradient for it.
        rows = torch.where(own, target - first, torch.where(kept, 0, -1))
        if width:
            losses, lse = torch.ops.llmops.cross_entropy(
                x, rows, None, -1, 0.0, 0.0, "none", torch.float32, backend
            )
        else:  # more ranks than parts of the vocabulary
            lse = torch.full(target.shape, -torch.inf, dtype=torch.float64, device=x.device)
            losses = lse.new_zeros(target.shape)
        terms = [lse, torch.where(own, lse - losses, 0.0)]
        if label_smoothing > 0:
            terms.append(x.sum(-1, dtype=torch.float64))
        mine = torch.stack(terms)
        parts = mine.new_empty((ranks, *mine.shape))
        dist.all_gather(list(parts.unbind()), mine, group=mesh.get_group(split))
        lse = parts[:, 0].logsumexp(0)
        loss = lse - parts[:, 1].sum(0)
        if label_smoothing > 0:
            even = lse - parts[:, 2].sum(0) / classes
            loss = (1 - label_smoothing) * loss + label_smoothing * even
        if z_loss:
            loss = loss + z_loss * lse.square()
        ctx.save_for_backward(x, rows, own, kept, lse)
        ctx.how, ctx.classes, ctx.backend = how, classes, backend
        return torch.where(kept, loss, 0.0).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, rows, own, kept, lse = ctx.saved_tensors
        _, label_smoothing, z_loss = ctx.how
        if x.shape[-1] == 0:
            return torch.zeros_like(x), *(None,) * 6
        grad = torch.where(kept, grad, 0.0).double()
        # The kernel's dx = toward (softmax - onehot) + rest softmax, softmax = exp(x - lse).
        toward = torch.where(own, (1 - label_smoothing) * grad, 0.0)
        rest = grad * (1 + 2 * z_loss * lse) - toward
        dx = torch.ops.llmops.cross_entropy_bwd(
            toward.float(), rest, x, rows, None, lse, -1, 0.0, 0.0, "none", ctx.backend
        )
        if label_smoothing > 0:
            dx -= (grad * (label_smoothing / ctx.classes))[..., None].to(dx.dtype)
        return dx, *(None,) * 6
