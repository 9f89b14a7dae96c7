"""embedding: token lookup, and learned positions added in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmops import backends, reference
from llmops.dispatch import resolve
from llmops.ops import _check, _dtensor
from llmops.ops._op import Op, is_tracing, shortcut

_is_compiling = torch.compiler.is_compiling


def embedding(
    tokens: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    positions: Tensor | None = None,
    position_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[..., :] = weight[tokens] (+ position_weight[positions]).

    Args:
        tokens: any shape, int64 or int32, each in [0, V).
        weight: [V, D], fp32/bf16/fp16 (fp64 on the reference), any strides.
        padding_idx: the row of weight that gets no gradient; negative counts from the end, as in
            torch. The lookup itself is not changed by it.
        positions: int64 or int32, broadcastable to tokens' shape, each in [0, P). None with a
            position_weight means 0 to T-1 along tokens' last dimension.
        position_weight: [P, D], weight's dtype: learned positions.
        backend: "cpu", "triton", "cuda", "reference" or "auto"; None follows use_backend.

    Returns:
        Tensor [*tokens.shape, D], contiguous, of weight's dtype.

    Raises:
        IndexError: an id outside its table, naming both. On "triton", which does not wait for the
            GPU's answer, such an id reads nothing, gives a row of NaN and takes no gradient.
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a named backend cannot serve the call.

    Numerics: the sum with a position is fp32, rounded once. The gradients are dense, added in fp32
    in the order of the tokens, so that they are the same bits for any number of threads.
    """
    if backend is None and padding_idx is None and positions is None and not is_tracing():
        raw = _embedding_raw(weight, tokens, position_weight)
        if raw is not None:
            try:
                if position_weight is None:
                    return raw(tokens, weight)  # type: ignore[no-any-return]
                return raw(tokens, weight, None, position_weight)  # type: ignore[no-any-return]
            except (RuntimeError, IndexError):
                pass  # the checks below say what is wrong
    _check.integers("embedding", "tokens", tokens)
    _check_table("weight", weight, tokens)
    padding = _padding(padding_idx, weight.shape[0])
    if position_weight is None:
        if positions is not None:
            raise ValueError(
                "llmops.embedding: positions need a position_weight [P, D]; pass it, or drop them"
            )
    else:
        positions = _positions(tokens, weight, positions, position_weight)
    name = resolve("embedding", weight.device, weight.dtype, (), backend)
    if name == "reference":
        if not _is_compiling():
            _check.within("embedding", "tokens", tokens, weight.shape[0], "weight has")
            if positions is not None and position_weight is not None:
                rows = position_weight.shape[0]
                _check.within("embedding", "positions", positions, rows, "position_weight has")
        return reference.embedding(
            tokens,
            weight,
            padding_idx=padding_idx,
            positions=positions,
            position_weight=position_weight,
        )
    return _embedding(tokens, weight, positions, position_weight, padding, name)  # type: ignore[no-any-return]


def _check_table(argument: str, table: Tensor, tokens: Tensor) -> None:
    _check.floating("embedding", argument, table)
    if table.dim() != 2:
        raise ValueError(
            f"llmops.embedding: {argument} must be [rows, D]; got shape {tuple(table.shape)}"
        )
    if table.device != tokens.device:
        _check.same_device("embedding", "tokens", tokens, argument, table)


def _padding(padding_idx: int | None, rows: int) -> int:
    """padding_idx as a row, or -1 for none."""
    if padding_idx is None:
        return -1
    if not -rows <= padding_idx < rows:
        raise ValueError(
            f"llmops.embedding: padding_idx must be in [{-rows}, {rows - 1}], weight's rows; got "
            f"{padding_idx}"
        )
    return padding_idx % rows


def _positions(
    tokens: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor
) -> Tensor:
    """positions as a tensor of tokens' shape."""
    _check_table("position_weight", position_weight, tokens)
    if position_weight.shape[1] != weight.shape[1] or position_weight.dtype != weight.dtype:
        raise ValueError(
            f"llmops.embedding: position_weight must be [P, {weight.shape[1]}] of "
            f"{_check.dtype_name(weight.dtype)}, as weight is; got {tuple(position_weight.shape)} "
            f"of {_check.dtype_name(position_weight.dtype)}"
        )
    if positions is None:
        if tokens.dim() == 0:
            raise ValueError("llmops.embedding: one token of no dimension needs positions")
        if tokens.shape[-1] > position_weight.shape[0]:
            raise IndexError(
                f"llmops.embedding: {tokens.shape[-1]} tokens, but position_weight has "
                f"{position_weight.shape[0]} rows"
            )
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        if _dtensor.is_distributed(tokens):
            positions = _dtensor.replicated(positions, tokens)
    _check.integers("embedding", "positions", positions)
    if positions.device != tokens.device:
        _check.same_device("embedding", "tokens", tokens, "positions", positions)
    shape = tokens.shape
    if positions.dim() > len(shape) or any(
        p not in (1, n) for p, n in zip(reversed(positions.shape), reversed(shape), strict=False)
    ):
        raise ValueError(
            f"llmops.embedding: positions of shape {tuple(positions.shape)} do not broadcast to "
            f"tokens of shape {tuple(shape)}"
        )
    return positions.expand(shape)


# ---- the operators -------------------------------------------------------------------------------

_embedding_raw = shortcut("embedding")


def _forward(
    tokens: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None,
    padding_idx: int, backend: str,
) -> Tensor:  # fmt: skip
    if backend != "cpu":
        backend = resolve("embedding", weight.device, weight.dtype, (), backend)
    if backend == "reference":
        return reference.embedding(
            tokens, weight, positions=positions, position_weight=position_weight
        )
    raw = backends.get(backend).embedding
    # An argument left to its default costs the call less than a None.
    if positions is None:
        return raw(tokens, weight)  # type: ignore[no-any-return]
    return raw(tokens, weight, positions, position_weight)  # type: ignore[no-any-return]


def _fake(
    tokens: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None,
    padding_idx: int, backend: str,
) -> Tensor:  # fmt: skip
    return weight.new_empty((*tokens.shape, weight.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, positions, position_weight, ctx.padding_idx, ctx.backend = inputs
    ctx.save_for_backward(tokens, positions)
    ctx.rows = weight.shape[0]
    ctx.position_rows = 0 if position_weight is None else position_weight.shape[0]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tokens, positions = ctx.saved_tensors
    dweight = dposition = None
    if ctx.needs_input_grad[1]:
        dweight = _embedding_bwd(grad, tokens, ctx.rows, ctx.padding_idx, ctx.backend)
    if positions is not None and ctx.needs_input_grad[3]:
        dposition = _embedding_bwd(grad, positions, ctx.position_rows, -1, ctx.backend)
    return None, dweight, None, dposition, None, None


def _forward_bwd(grad: Tensor, ids: Tensor, rows: int, padding_idx: int, backend: str) -> Tensor:
    if backend != "cpu":
        backend = resolve("embedding_bwd", grad.device, grad.dtype, (), backend)
    if backend == "reference":
        return reference.embedding_bwd(grad, ids, rows, padding_idx)
    return backends.get(backend).embedding_bwd(grad, ids, rows, padding_idx)  # type: ignore[no-any-return]


def _fake_bwd(grad: Tensor, ids: Tensor, rows: int, padding_idx: int, backend: str) -> Tensor:
    return grad.new_empty((rows, grad.shape[-1]))


_embedding_bwd = Op(
    "embedding_bwd(Tensor grad, Tensor ids, SymInt rows, int padding_idx, str backend) -> Tensor",
    forward=_forward_bwd,
    fake=_fake_bwd,
    reference=reference.embedding_bwd,
)
_embedding = Op(
    "embedding(Tensor tokens, Tensor weight, Tensor? positions, Tensor? position_weight, "
    "int padding_idx, str backend) -> Tensor",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
)
