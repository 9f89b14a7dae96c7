"""llmops.integrations.flash_attn: flash-attn's signatures, and the argument combinations that its
own public tests run, at sizes for a CPU."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import pytest
import torch
from flash_attn_kit import (
    BATCH,
    HEADS,
    attend,
    by_dtype,
    check,
    check_dropped,
    combinations,
    describe,
    modifiers,
)
from torch import Tensor

import llmops
from llmops.integrations import flash_attn
from llmops.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)

pytestmark = pytest.mark.usefixtures("one_thread")
by_heads = pytest.mark.parametrize("heads", HEADS)

# ---- the interface -------------------------------------------------------------------------------

_ATTENTION = (
    "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 "
    "alibi_slopes=None deterministic=False return_attn_probs=False"
)
_BOUNDARIES = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
# flash-attn 2.8.4: parameters in order, with their defaults.
SIGNATURES = {
    "flash_attn_func": f"q k v {_ATTENTION}",
    "flash_attn_kvpacked_func": f"q kv {_ATTENTION}",
    "flash_attn_qkvpacked_func": f"qkv {_ATTENTION}",
    "flash_attn_varlen_func": f"q k v {_BOUNDARIES} {_ATTENTION} block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q kv {_BOUNDARIES} {_ATTENTION}",
    "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {_ATTENTION}",
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None "
        "cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False "
        "window_size=(-1,-1) softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 "
        "return_softmax_lse=False"
    ),
    "apply_rotary_emb": (
        "x cos sin interleaved=False inplace=False seqlen_offsets=0 cu_seqlens=None max_seqlen=None"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_flash_attn_signature(name: str) -> None:
    found = inspect.signature(getattr(flash_attn, name)).parameters.values()
    shown = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace(", ", ",")
        for p in found
    ]
    assert " ".join(shown) == SIGNATURES[name]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found)


def test_flash_attn_exports_what_is_tabled() -> None:
    assert sorted(SIGNATURES) == flash_attn.__all__


def test_flash_attn_example_of_the_docstring_runs() -> None:
    paragraphs = (flash_attn.__doc__ or "").split("\n\n")
    example = textwrap.dedent("\n".join(p for p in paragraphs if p.startswith("    ")))
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["out"].shape == (2, 128, 8, 64) and bool(names["out"].isfinite().all())


# ---- flash_attn_func and its packed forms --------------------------------------------------------

# (Tq, Tk): odd, even, more queries than keys, one off, equal, one query.
SIZES = ((13, 23), (16, 29), (33, 16), (31, 32), (32, 31), (40, 40), (1, 37), (20, 75))
DIMS = (32, 40, 59, 64, 111, 128, 96)


def shim_and_plain(fn: Any, split: Any, arguments: dict[str, Any], extra: dict[str, Any]) -> Any:
    """The call of the shim `fn`, and the same in plain PyTorch; `split` makes q, k, v of inputs.
    The weights that the shim says it dropped are dropped in the plain one, too."""
    keep: list[Tensor] = []
    dropout_p = extra["dropout_p"]

    def shim(*inputs: Tensor) -> Any:
        with llmops.use_backend("cpu"):
            out, lse, dropped = fn(*inputs, **arguments, **extra, return_attn_probs=True)
        q, k, _ = split(*inputs)
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert dropped.dtype == q.dtype and dropped.shape == (shape if dropout_p else (0,))
        if dropout_p:
            keep[:] = [(dropped >= 0) / (1 - dropout_p)]
            check_dropped(dropped, q, k, arguments)
        return out, lse

    def plain(*inputs: Tensor) -> Any:
        mask = keep[0].to(inputs[0].dtype) if keep else None
        return attend(*split(*inputs), **arguments, keep=mask)

    return shim, plain


@by_dtype
@by_heads
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "kvpacked"])
def test_flash_attn_func_combinations(dtype: torch.dtype, heads: str, packed: bool) -> None:
    torch.manual_seed(0)
    hq, hkv = HEADS[heads]
    for alibi, local, arguments, extra, (queries, keys), dim in combinations(SIZES, DIMS):
        arguments = modifiers(arguments, alibi, local, hq, keys)
        q = torch.randn(BATCH, queries, hq, dim).to(dtype) * (arguments["softcap"] or 1.0)
        kv = torch.randn(BATCH, keys, 2, hkv, dim).to(dtype)
        what = f"{queries}x{keys}x{dim} {describe(arguments, extra)}"
        if packed:
            split = lambda q, kv: (q, *kv.unbind(2))  # noqa: E731
            check(*shim_and_plain(flash_attn_kvpacked_func, split, arguments, extra), (q, kv), what)
        else:
            split = lambda q, k, v: (q, k, v)  # noqa: E731
            inputs = (q, *kv.unbind(2))
            check(*shim_and_plain(flash_attn_func, split, arguments, extra), inputs, what)


@by_dtype
def test_flash_attn_qkvpacked_func_combinations(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    split = lambda qkv: qkv.unbind(2)  # noqa: E731
    for alibi, local, arguments, extra, tokens, dim in combinations((25, 32, 57, 3, 97), DIMS):
        arguments = modifiers(arguments, alibi, local, 5, tokens)
        qkv = torch.randn(BATCH, tokens, 3, 5, dim).to(dtype)
        what = f"{tokens}x{dim} {describe(arguments, extra)}"
        check(*shim_and_plain(flash_attn_qkvpacked_func, split, arguments, extra), (qkv,), what)


@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.17])
def test_flash_attn_bitwise_repeatable(name: str, dropout_p: float) -> None:
    """Seeded alike: the same bits in results and gradients, deterministic or not, with and without
    the weights being returned, on one thread and on two."""
    results = []
    for run in range(4):
        torch.set_num_threads(1 + run % 2)
        generator = torch.Generator().manual_seed(3)
        q, k, v = (
            torch.randn(2, t, h, 32, generator=generator).bfloat16().requires_grad_()
            for t, h in ((70, 4), (90, 2), (90, 2))
        )
        arguments: dict[str, Any] = {"causal": True, "window_size": (40, 0), "dropout_p": dropout_p}
        arguments |= {"deterministic": run == 0, "return_attn_probs": run == 3}
        torch.manual_seed(7)
        if name == "flash_attn_func":
            result = flash_attn_func(q, k, v, **arguments)
        else:
            cu_q, cu_k = torch.tensor([0, 70, 140]), torch.tensor([0, 90, 180])
            packed = (x.flatten(0, 1) for x in (q, k, v))
            result = flash_attn.flash_attn_varlen_func(*packed, cu_q, cu_k, 70, 90, **arguments)
        out = result[0] if isinstance(result, tuple) else result
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@by_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_any_strides(dtype: torch.dtype, causal: bool) -> None:
    """[H, B, T, D] in memory, a gradient that arrives transposed, a head dim with gaps."""
    torch.manual_seed(0)
    leaves = [torch.randn(3, 2, t, 40).to(dtype) for t in (19, 33, 33)]

    def shim(*x: Tensor) -> Any:
        q, k, v = (t.permute(1, 2, 0, 3) for t in x)
        k = torch.stack([k, torch.full_like(k, torch.nan)], -1)[..., 0]
        out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
        return out.permute(2, 0, 1, 3), lse

    def plain(*x: Tensor) -> Any:
        out, lse = attend(*(t.permute(1, 2, 0, 3) for t in x), causal=causal)
        return out.permute(2, 0, 1, 3), lse

    check(shim, plain, tuple(leaves), f"causal={causal}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_large_scores(dtype: torch.dtype, causal: bool) -> None:
    """Scores so large that most rows have one key: no overflow, no NaN beyond odd lengths."""
    torch.manual_seed(0)
    for tokens, dim in ((2, 16), (5, 32), (17, 64), (97, 16)):
        q, k, v = (torch.randn(2, tokens, 5, dim).to(dtype) * size for size in (5, 3, 3))

        def shim(*x: Tensor) -> Any:
            return flash_attn_func(*x, causal=causal, return_attn_probs=True)[:2]

        check(shim, lambda *x: attend(*x, causal=causal), (q, k, v), f"{tokens}x{dim}")


def test_flash_attn_softmax_scale_and_lse_gradient() -> None:
    """softmax_scale by position; softmax_lse differentiable, which upstream's is not."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, t, 3, 24, requires_grad=True) for t in (9, 21, 21)]
    got = flash_attn_func(*inputs, 0.0, 0.11, True, (-1, -1), 0.0, None, False, True)
    want = attend(*inputs, softmax_scale=0.11, causal=True)
    torch.testing.assert_close(got[:2], want)
    grads = [torch.autograd.grad(x[0].sum() + x[1].sin().sum(), inputs) for x in (got, want)]
    torch.testing.assert_close(*grads)


def test_flash_attn_results_without_probabilities() -> None:
    """One tensor without return_attn_probs; with it an empty S_dmask unless something drops."""
    q = torch.randn(2, 9, 4, 16)
    out = flash_attn_func(q, q, q)
    assert isinstance(out, Tensor) and out.shape == q.shape and out.is_contiguous()
    probs = flash_attn_func(q, q, q, return_attn_probs=True)
    assert [tuple(x.shape) for x in probs] == [(2, 9, 4, 16), (2, 4, 9), (0,)]
    assert torch.equal(probs[0], out)


Q, K = torch.zeros(2, 5, 4, 8), torch.zeros(2, 7, 2, 8)


@pytest.mark.parametrize(
    ("error", "match", "args", "kwargs"),
    [
        (ValueError, "q must be", (Q[0], K, K), {}),
        (ValueError, "k must be", (Q, K[0], K), {}),
        (TypeError, "v must be", (Q, K, None), {}),
        (TypeError, "v has dtype", (Q, K, K.half()), {}),
        (ValueError, "head dim 8", (Q, K[..., :4], K[..., :4]), {}),
        (ValueError, "number of heads", (Q, Q[:, :, :3], Q[:, :, :3]), {}),
        (ValueError, "k and v must agree", (Q, K, K[:, :5]), {}),
        (ValueError, "batch size", (Q, K[:1], K[:1]), {}),
        (ValueError, "window_size", (Q, K, K), {"window_size": (1, 2, 3)}),
        (ValueError, "softcap", (Q, K, K), {"softcap": -2.0}),
        (ValueError, "alibi_slopes", (Q, K, K), {"alibi_slopes": torch.ones(3)}),
        (ValueError, "dropout_p", (Q, K, K), {"dropout_p": 1.5}),
    ],
)  # fmt: skip
def test_flash_attn_func_refuses(error: Any, match: str, args: Any, kwargs: Any) -> None:
    with pytest.raises(error, match=match):
        flash_attn_func(*args, **kwargs)


def test_flash_attn_packed_refuses() -> None:
    with pytest.raises(ValueError, match=r"qkv must be .* got 2 in place of the 3"):
        flash_attn_qkvpacked_func(torch.zeros(2, 5, 2, 4, 8))
    with pytest.raises(ValueError, match="kv must be"):
        flash_attn_kvpacked_func(Q, torch.zeros(2, 5, 3, 4, 8))


def test_flash_attn_compiles_fullgraph() -> None:
    """One graph from fused projection through rotation and attention, forward and backward."""
    torch.manual_seed(0)
    angle = torch.rand(20, 8)

    def layer(qkv: Tensor) -> Any:
        q, k, v = qkv.unbind(2)
        q = flash_attn.apply_rotary_emb(q, angle.cos(), angle.sin(), seqlen_offsets=3)
        out = flash_attn_func(q, k, v, causal=True, window_size=(8, 0), softcap=20.0)
        cu = torch.tensor([0, 17, 34])
        packed = (x.flatten(0, 1) for x in (q, k, v))
        return out, flash_attn.flash_attn_varlen_func(*packed, cu, cu, 17, 17, causal=True)

    qkv = torch.randn(2, 17, 3, 4, 16, requires_grad=True)
    results = [fn(qkv) for fn in (layer, torch.compile(layer, fullgraph=True))]
    grads = [torch.autograd.grad(a.sum() + b.square().sum(), qkv) for a, b in results]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*grads)
