"""apply_rotary_emb: flash-attn's argument combinations against rotation by complex numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_attn_kit import by_dtype, rotate
from torch import Tensor

from llmops.integrations.flash_attn import apply_rotary_emb
from llmops.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, TOKENS, HEADS, DIM = 4, 21, 3, 32


def tables(dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.rand(2 * TOKENS, dim // 2, dtype=torch.float64) * 6.3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def offsets_of(kind: str, batch: int) -> Any:
    return {
        "none": 0,
        "int": int(torch.randint(0, TOKENS + 1, ())),
        "tensor": torch.randint(0, TOKENS + 1, (batch,), dtype=torch.int32),
    }[kind]


def check(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, **arguments: Any
) -> None:
    """Result and gradient; x [B, T, H, D], or packed with positions [1, total]."""
    before = x.clone()
    leaf = x.clone().requires_grad_()
    out = apply_rotary_emb(leaf, cos, sin, interleaved, **arguments)
    inplace = arguments.get("inplace", False)
    assert (out.data_ptr() == leaf.data_ptr()) == inplace and out.dtype == x.dtype
    assert torch.equal(leaf.detach(), out.detach() if inplace else before)
    cotangent = torch.randn_like(before)
    sent = cotangent.clone()
    (grad,) = torch.autograd.grad(out, leaf, sent)
    assert torch.equal(sent, cotangent), "the incoming gradient changed"
    batched = (lambda t: t) if x.dim() == 4 else (lambda t: t[None])
    wide = (cos.double(), sin.double(), positions)
    want = rotate(batched(before.double()), *wide, interleaved).view_as(x)
    turned_back = (wide[0], -wide[1], positions)
    want_grad = rotate(batched(cotangent.double()), *turned_back, interleaved).view_as(x)
    # PyTorch's own error in this dtype is one rounding of the result.
    assert_close(out, want, want.to(x.dtype), factor=2.0, what="out")
    assert_close(grad, want_grad, want_grad.to(x.dtype), factor=3.0, what="gradient")


@by_dtype
@pytest.mark.parametrize("offsets", ["none", "int", "tensor"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
def test_flash_attn_rotary_combinations(
    varlen: bool,
    inplace: bool,
    interleaved: bool,
    fraction: float,
    offsets: str,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    cos, sin = tables(int(fraction * DIM), dtype)
    shift = offsets_of(offsets, BATCH)
    starts = shift[:, None] if isinstance(shift, Tensor) else torch.full((BATCH, 1), shift)
    positions = starts + torch.arange(TOKENS)
    arguments: dict[str, Any] = {"inplace": inplace, "seqlen_offsets": shift}
    if not varlen:
        x = torch.randn(BATCH, TOKENS, HEADS, DIM).to(dtype)
        check(x, cos, sin, positions, interleaved, **arguments)
        return
    lengths = (TOKENS, 0, 5, 13)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = torch.cat([row[:n] for row, n in zip(positions, lengths, strict=True)])[None]
    x = torch.randn(sum(lengths), HEADS, DIM).to(dtype)
    arguments |= {"cu_seqlens": cu_seqlens, "max_seqlen": TOKENS}
    check(x, cos, sin, packed, interleaved, **arguments)


def test_flash_attn_rotary_inplace_of_a_computed_tensor() -> None:
    """Autograd knows of the write: x itself leads to the rotation, and what needed x's old values
    raises, where upstream would give a wrong gradient."""
    torch.manual_seed(0)
    cos, sin = tables(DIM, torch.float32)
    leaf = torch.randn(2, TOKENS, HEADS, DIM, requires_grad=True)
    x = leaf * 2.0
    assert apply_rotary_emb(x, cos, sin, inplace=True) is x
    (grad,) = torch.autograd.grad(x.square().sum(), leaf)
    torch.testing.assert_close(grad, 8 * leaf)  # rotations keep lengths
    x = leaf.square()
    needs_x = x.square()
    apply_rotary_emb(x, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        needs_x.sum().backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_flash_attn_rotary_gradient_of_tables_is_refused(inplace: bool) -> None:
    cos, sin = tables(DIM, torch.float32)
    x = torch.randn(2, TOKENS, HEADS, DIM, requires_grad=True)
    with pytest.raises(NotImplementedError, match="cos or sin requires a gradient"):
        apply_rotary_emb(x, cos.requires_grad_(), sin, inplace=inplace)


def test_flash_attn_rotary_inplace_of_a_view() -> None:
    """q and k inside a fused projection, rotated where they lie."""
    torch.manual_seed(0)
    cos, sin = tables(DIM, torch.float32)
    qkv = torch.randn(2, TOKENS, 3, HEADS, DIM)
    want = qkv.clone()
    for i in range(2):
        want[:, :, i] = rotate(qkv[:, :, i], cos, sin, torch.arange(TOKENS).expand(2, -1))
        apply_rotary_emb(qkv[:, :, i], cos, sin, inplace=True)
    torch.testing.assert_close(qkv, want)


X = torch.zeros(2, 5, 1, 8)
T = torch.ones(6, 4)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "match", "args", "kwargs"),
    [
        (ValueError, r"x must be \[B, T, H, D\]", (X[0], T, T), {}),
        (ValueError, "x must be .*cu_seqlens", (X, T, T), {"cu_seqlens": CU, "max_seqlen": 3}),
        (ValueError, "max_seqlen must be given", (X[0], T, T), {"cu_seqlens": CU}),
        (ValueError, "max_seqlen is 2", (X[0], T, T), {"cu_seqlens": CU, "max_seqlen": 2}),
        (ValueError, "max_seqlen=9 without cu_seqlens", (X, T, T), {"max_seqlen": 9}),
        (ValueError, "cu_seqlens must run", (X[0], T, T), {"cu_seqlens": CU[:2], "max_seqlen": 3}),
        (TypeError, "cu_seqlens", (X[0], T, T), {"cu_seqlens": CU.float(), "max_seqlen": 3}),
        (IndexError, "seqlen_offsets=2", (X, T, T), {"seqlen_offsets": 2}),
        (IndexError, "seqlen_offsets=-1", (X, T, T), {"seqlen_offsets": -1}),
        (IndexError, "position_ids", (X, T, T), {"seqlen_offsets": torch.tensor([0, 2])}),
        (IndexError, "position_ids", (X, T, T), {"seqlen_offsets": torch.tensor([0, -1])}),
        (ValueError, "seqlen_offsets", (X, T, T), {"seqlen_offsets": torch.tensor([0, 1, 1])}),
        (TypeError, "seqlen_offsets", (X, T, T), {"seqlen_offsets": torch.ones(2)}),
        (ValueError, "cos", (X, torch.ones(6, 5), torch.ones(6, 5)), {}),
        (ValueError, "sin", (X, T, T[:, :2]), {}),
    ],
)  # fmt: skip
def test_flash_attn_rotary_refuses(error: Any, match: str, args: Any, kwargs: Any) -> None:
    with pytest.raises(error, match=match):
        apply_rotary_emb(*args, **kwargs)
